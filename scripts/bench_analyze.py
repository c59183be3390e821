"""What an analysis costs: its time against a soup of the same models, its memory at two depths.

    python scripts/bench_analyze.py FOLDER [--size 0.5B] [--layers 6,24] [--rounds 3]

Writes families (scripts/synthetic.py: a base and three models) of the size with each number of
layers into FOLDER. Merge and analysis take turns as processes of their own, with a warm cache; the
ratio is the median of the rounds, least and largest in brackets. An analysis reads the base, too,
and writes nothing; the soup reads three models and writes one. CPU seconds are less noisy than the
clock's on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench_process import Usage, command_of, run_measured
from synthetic import SIZES

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5B")
    parser.add_argument("--layers", default="6,24", help="depths, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", type=int, default=3)
    given = parser.parse_args()
    for layers in map(int, given.layers.split(",")):
        family = given.folder / f"{given.size}-{layers}-{given.sources}"
        # In another process: on Linux a child's peak starts from its parent's, and numpy is large.
        make = [sys.executable, str(ROOT / "scripts" / "synthetic.py"), str(family)]
        depth = ["--layers", str(layers), "--sources", str(given.sources)]
        subprocess.run([*make, "--size", given.size, *depth], check=True)
        measure(family, given.sources, given.rounds)


def measure(family: Path, sources: int, rounds: int) -> None:
    """Print one line: seconds, ratio, peaks."""
    models = [f"model{i}" for i in range(sources)]
    recipe = family / "soup.yaml"
    recipe.write_text(
        json.dumps({"merge_method": "soup", "models": [{"model": m} for m in models]})
    )
    command, env = command_of(str(ROOT))
    out = family / "out"
    merges, analyses = [], []
    for turn in range(-1, rounds):  # the first compiles, fills the cache, and does not count
        shutil.rmtree(out, ignore_errors=True)
        merge = run_measured([*command, "run", str(recipe), str(out)], env, family)
        names = [str(family / m) for m in models]
        base = ["--base", str(family / "base")]
        analysis = run_measured([*command, "analyze", *base, *names], env, family)
        if turn >= 0:
            merges.append(merge)
            analyses.append(analysis)
    shutil.rmtree(out, ignore_errors=True)
    for field, name in (("seconds", "seconds"), ("cpu_seconds", "CPU seconds")):
        soup, ours = ([getattr(one, field) for one in runs] for runs in (merges, analyses))
        ratios = [a / m for a, m in zip(ours, soup, strict=True)]
        print(f"  {name}: soup {_spread(soup)}, analysis {_spread(ours)}, ratio {_spread(ratios)}")
    print(
        f"  peak memory: soup {_peak(merges)} MB, analysis {_peak(analyses)} MB; "
        f"{os.cpu_count()} cores",
        flush=True,
    )


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _peak(usages: Sequence[Usage]) -> str:
    return f"{max(usage.max_rss for usage in usages) / 1e6:.0f}"


if __name__ == "__main__":
    main()
