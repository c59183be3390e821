"""What it costs to extract an adapter, and to merge adapters with one another.

    python scripts/bench_adapters.py FOLDER                # 0.5B parameters, a few minutes
    python scripts/bench_adapters.py FOLDER --size 20M --rounds 1

The peer is a soup of the base and its fine-tune (scripts/synthetic.py): both are read once, as for
an extraction. The adapters that are merged are extracted from two fine-tunes. Whole processes take
turns; the ratio is the median of the rounds', least and largest in brackets. The page cache is
warm. Peaks are of memory that no file backs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from bench_process import print_ratios, run_measured
from synthetic import SIZES, Settings, make_family

PEER = "soup of two models"


def write_recipes(folder: Path) -> None:
    recipes: dict[str, dict[str, Any]] = {
        "soup": {"models": [{"model": "base"}, {"model": "model0"}]},
        "task_arithmetic": {
            "models": [{"model": "rank16"}, {"model": "other16"}],
            "output": "adapter",
        },
        "ties": {
            "models": [{"model": "rank16"}, {"model": "other16"}],
            "output": "adapter",
            "parameters": {"density": 0.5},
        },
    }
    for method, about in recipes.items():
        text = json.dumps({"merge_method": method, **about})
        (folder / f"{method}.yaml").write_text(text)


def cases(folder: Path) -> dict[str, list[str]]:
    """Arguments of merge-cli, which each write OUT."""
    out = str(folder / "out")

    def extract(rank: int) -> list[str]:
        return ["extract-lora", "model0", out, "--base", "base", "--rank", str(rank)]

    return {
        PEER: ["run", "soup.yaml", out],
        "extract, rank 16": extract(16),
        "extract, rank 64": extract(64),
        "extract, 50 % of the energy": [*extract(16)[:5], "--energy", "0.5"],
        "task_arithmetic of two adapters of rank 16": ["run", "task_arithmetic.yaml", out],
        "ties of two adapters of rank 16": ["run", "ties.yaml", out],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="0.5B", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    make_family(given.folder, Settings(SIZES[given.size], sources=2))
    write_recipes(given.folder)
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    program = [sys.executable, "-m", "merge_cli"]

    def run(arguments: list[str]) -> tuple[float, int]:
        usage = run_measured(
            [*program, *arguments, "-q", "--device", "cpu"], environment, given.folder
        )
        return usage.seconds, usage.peak_anonymous or 0

    for model, name in (("model0", "rank16"), ("model1", "other16")):
        if not (given.folder / name).exists():
            run(
                ["extract-lora", model, name, "--base", "base", "--rank", "16", "--exclude", "norm"]
            )
    found: dict[str, list[tuple[float, int]]] = {}
    for number in range(given.rounds + 1):
        for label, arguments in cases(given.folder).items():
            shutil.rmtree(given.folder / "out", ignore_errors=True)
            usage = run(arguments)
            if number:  # the first round compiles and warms the cache
                found.setdefault(label, []).append(usage)
    shutil.rmtree(given.folder / "out", ignore_errors=True)
    print_ratios(given.size, found)


if __name__ == "__main__":
    main()
