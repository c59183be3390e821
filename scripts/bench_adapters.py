"""What it costs to extract an adapter, and to merge adapters with one another.

    python scripts/bench_adapters.py FOLDER                # 0.5B parameters, a few minutes
    python scripts/bench_adapters.py FOLDER --size 20M --rounds 1

The peer is a soup of the base and its fine-tune (scripts/synthetic.py): both are read once, as for
an extraction. The adapters that are merged are extracted from two fine-tunes. Whole processes take
turns; the ratio of CPU seconds is the median of the rounds', least and largest in brackets. The
page cache is warm. Peaks are of memory that no file backs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench_process import Turns, command_of, run_measured
from synthetic import SIZES, Settings, make_family

QUIET = ("-q", "--device", "cpu")


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

    def extract(option: str, value: str) -> list[str]:
        return ["extract-lora", "model0", out, "--base", "base", option, value, *QUIET]

    def run(recipe: str) -> list[str]:
        return ["run", f"{recipe}.yaml", out, *QUIET]

    return {
        "soup of two models": run("soup"),
        "extract, rank 16": extract("--rank", "16"),
        "extract, rank 64": extract("--rank", "64"),
        "extract, 50 % of the energy": extract("--energy", "0.5"),
        "task_arithmetic of two adapters of rank 16": run("task_arithmetic"),
        "ties of two adapters of rank 16": run("ties"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="0.5B", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="another checkout, measured in the same rounds")
    parser.add_argument("--only", action="append", default=[], help="a part of a row's label")
    given = parser.parse_args()
    make_family(given.folder, Settings(SIZES[given.size], sources=2))
    write_recipes(given.folder)
    command, environment = command_of(str(Path(__file__).resolve().parents[1]))
    for model, name in (("model0", "rank16"), ("model1", "other16")):
        if not (given.folder / name).exists():
            arguments = ["--base", "base", "--rank", "16", "--exclude", "norm"]
            run_measured(
                [*command, "extract-lora", model, name, *arguments], environment, given.folder
            )
    turns = Turns(
        cases(given.folder),
        given.folder,
        given.folder / "out",
        given.rounds,
        given.before,
        given.only,
    )
    turns.run(given.size)


if __name__ == "__main__":
    main()
