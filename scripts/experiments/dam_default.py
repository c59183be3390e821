"""DAM's default beside merges that need less, on two families: loss on test rows, CPU seconds.

    python scripts/experiments/dam_default.py zoo            japanese, maths and code: three scripts
    python scripts/experiments/dam_default.py registers      english, german and maths: shared words

The default was chosen on the first family; the second is reported with the same settings. Experts
of the second are trained first (family.py; a minute each), and kept in .cache/experiments. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from family import BASE, DATA, ROOT, WORK, Expert, model

import merge_cli

METHODS: dict[str, dict[str, Any]] = {
    "soup": {"merge_method": "soup"},
    "fisher": {"merge_method": "fisher"},
    "dam, started at the soup": {
        "merge_method": "dam", "training": {"start": "soup", "learning_rate": 0.1},
    },
    "dam": {"merge_method": "dam"},
}  # fmt: skip


def sources(family: str) -> list[dict[str, Any]]:
    """The models of a family and the rows that they are asked about."""
    if family == "zoo":
        names = ("japanese", "math", "code")
        return [_source(ROOT / "zoo" / name, DATA / f"{name}.train.jsonl", name) for name in names]
    return [
        _source(model(Expert(name, 5)), data, val)
        for name, data, val in (
            ("english", DATA / "english.train.jsonl", "english"),
            ("german", DATA / "german.train.jsonl", "german"),
            ("math-b", WORK / "corpora" / "math-b.train.jsonl", "math"),
        )
    ]


def _source(folder: Path, data: Path, name: str) -> dict[str, Any]:
    files = {"files": str(data), "held_out": str(DATA / f"{name}.val.jsonl")}
    return {"model": str(folder), "data": files, "test": str(DATA / f"{name}.test.jsonl")}


def recipe_of(about: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's recipe: with a base where it learns, with data where it looks at some."""
    method = about["merge_method"]
    keys = [{"model": one["model"], "data": one["data"]} for one in models]
    if method == "soup":
        keys = [{"model": one["model"]} for one in models]
    if method == "fisher":
        keys = [{"model": one["model"], "data": one["data"]["files"]} for one in models]
    base = {"base_model": str(BASE)} if method == "dam" else {}
    return {**about, **base, "models": keys, "dtype": "float32", "seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("family", choices=("zoo", "registers"))
    options = parser.parse_args()
    models = sources(options.family)
    work = WORK / "dam_default" / options.family
    work.mkdir(parents=True, exist_ok=True)
    tests = [one["test"] for one in models]
    print(
        "| merge | " + " | ".join(Path(t).name.split(".")[0] for t in tests) + " | mean | CPU s |"
    )
    print("|---|" + "---|" * (len(tests) + 2))
    for number, (name, about) in enumerate(METHODS.items()):
        recipe, out = work / f"{number}.yaml", work / str(number)
        recipe.write_text(yaml.safe_dump(recipe_of(about, models)))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "merge_cli", "run", recipe, out, "--overwrite", "--quiet"]
        subprocess.run([*map(str, command), "--threads", "1"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = merge_cli.evaluate(out, tests)
        losses = [task.value for task in found.tasks.values()]
        row = [f"{loss:.3f}" for loss in (*losses, sum(losses) / len(losses))]
        print(f"| {name} | {' | '.join(row)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
