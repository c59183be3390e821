"""Small tensors: a mixture of experts against the dense model of the same bytes, in CPU seconds.

    python scripts/bench_small.py FOLDER --layers 20 --methods soup,ties --rounds 2

The dense twin has the mixture's layers and hidden size, and one feed-forward of the experts' sizes
together. Whole processes take turns; the ratio is of the medians of user and system seconds, and
of what is left without the start (a merge of the 20M family).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench_process import command_of, run_measured
from bench_recipes import METHODS, write_recipe
from synthetic import SIZES, Settings, make_family, parameter_count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--methods", default="soup,ties")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ours", default=str(Path(__file__).resolve().parent.parent))
    given = parser.parse_args()
    moe = replace(SIZES["moe"], layers=given.layers)
    dense = replace(moe, experts=0, feed_forward=moe.feed_forward * moe.experts)
    sizes = {"start": SIZES["20M"], "dense": dense, "moe": moe}
    for name, size in sizes.items():
        make_family(given.folder / f"{name}-{given.layers}", Settings(size))
    command, env = command_of(given.ours)
    work = given.folder / "run"
    print("| method | dense CPU s | moe CPU s | ratio | without the start, per element |")
    print("|---|---:|---:|---:|---:|")
    for method in given.methods.split(","):
        seconds: dict[str, list[float]] = {name: [] for name in sizes}
        for number in range(given.rounds + 1):  # the first compiles and fills the cache
            for name in sizes if number % 2 else reversed(sizes):
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                family = given.folder / f"{name}-{given.layers}"
                write_recipe(work / "recipe.yaml", family.absolute(), METHODS[method])
                usage = run_measured([*command, "run", "recipe.yaml", "out", "-q"], env, work)
                said = f"{method}, {name}: {usage.cpu_seconds:.2f} CPU s"
                print(said if number else f"{said} (warming up)", file=sys.stderr, flush=True)
                if number:
                    seconds[name].append(usage.cpu_seconds)
        start, plain, small = (median(seconds[name]) for name in sizes)
        elements = parameter_count(dense) / parameter_count(moe)
        alone = (small - start) / (plain - start) * elements
        print(f"| {method} | {plain:.2f} | {small:.2f} | {small / plain:.2f} | {alone:.2f} |")
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
