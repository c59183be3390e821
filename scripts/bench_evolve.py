"""Candidates per second: one live model rewritten in place, against writing and loading a model.

    python scripts/bench_evolve.py                       # a few minutes on one core
    python scripts/bench_evolve.py --rounds 3 --rows 4

Both sides score the same candidates of a search on the same rows with one thread. *In memory* is
what a search does; *by disk* merges each candidate into a folder with the engine (no statistics),
loads it with transformers and evaluates it. *Rewriting* is the part of the former that makes the
weights. Rounds take turns; the ratio is the median of the rounds' ratios. Scores of both sides must
be equal, or nothing is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from merge_cli.api import merge
from merge_cli.evaluation.run import evaluate_source
from merge_cli.evolve.evaluator import Evaluator
from merge_cli.evolve.jobs import EvaluationJob, Setup, values_of
from merge_cli.evolve.plan import plan_search
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source

ZOO = Path(__file__).resolve().parents[1] / "zoo"
OPTIONS = MergeOptions(device="cpu", threads=1, statistics=False, overwrite=True, fresh=True)
SPACES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": {"min": 0.0, "max": 1.0}},
    "ties, fixed density": {"weight": {"min": 0.0, "max": 1.0}},
    "ties": {"weight": {"min": 0.0, "max": 1.0}, "density": {"min": 0.1, "max": 0.9}},
    "dare_ties": {"weight": {"min": 0.0, "max": 1.0}, "density": {"min": 0.1, "max": 0.9}},
}


def recipe_for(name: str, rows: int) -> dict[str, Any]:
    """A search of three experts on a few rows of two domains."""
    method, _, fixed = name.partition(",")
    return {
        "merge_method": "evolutionary",
        "base_model": str(ZOO / "base"),
        "models": [{"model": str(ZOO / expert)} for expert in ("japanese", "math", "code")],
        **({"parameters": {"density": 0.3}} if fixed else {}),
        "search": {"method": method, "parameters": SPACES[name], "layer_groups": 2},
        "objective": {
            "max_length": 128,
            "tasks": [
                {"task": "loss", "data": str(ZOO / "data" / "math.val.jsonl"), "limit": 4 * rows},
                {"task": "loss", "data": str(ZOO / "data" / "japanese.val.jsonl"), "limit": rows},
            ],
        },
        "dtype": "bfloat16",
    }


def bench(name: str, rows: int, rounds: int, count: int, folder: Path) -> list[str]:
    """One row of the table."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_for(name, rows)), encoding="utf-8")
    plan = make_plan(load_recipe(file))
    decided = plan_search(plan, OPTIONS)
    assert decided.space is not None
    spec = replace(decided.objective.search.spec, cache=False)
    evaluator = Evaluator(Setup(decided.static(), decided.objective, OPTIONS))
    generator = torch.Generator().manual_seed(0)
    evaluator.answer(EvaluationJob(0, decided.static()))  # compiled and loaded
    ratios, memory, disk, rewriting = [], [], [], []
    for number in range(rounds):
        genomes = torch.rand(count, len(decided.space), generator=generator).tolist()
        recipes = [decided.space.recipe(genome) for genome in genomes]
        began = time.perf_counter()
        ours = [
            evaluator.answer(EvaluationJob(i, recipe)).values for i, recipe in enumerate(recipes)
        ]
        middle = time.perf_counter()
        theirs = []
        for recipe in recipes:
            out = merge(recipe, folder / "candidate", options=OPTIONS).path
            source = open_source(ModelRef(str(out)), folder)
            theirs.append(values_of(dict(evaluate_source(source, spec).tasks)))
        disk.append((time.perf_counter() - middle) / count)
        if ours != theirs:
            raise SystemExit(f"{name}, round {number}: the scores differ")
        fresh = torch.rand(count, len(decided.space), generator=generator).tolist()
        others = [decided.space.recipe(genome) for genome in fresh]
        ended = time.perf_counter()
        for recipe in others:
            evaluator.merge.become(recipe)
        rewriting.append((time.perf_counter() - ended) / count)
        memory.append((middle - began) / count)
        ratios.append(disk[-1] / memory[-1])
    evaluator.close()
    median = statistics.median
    return [
        name,
        f"{1 / median(memory):.2f}",
        f"{1 / median(disk):.2f}",
        f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        f"{1000 * median(rewriting):.0f} ms",
        f"{1000 * median(memory):.0f} ms",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=4, help="candidates of a round")
    parser.add_argument("--rows", type=int, default=4, help="of japanese; four times as many math")
    parser.add_argument("--methods", default=",".join(range_names()), help="separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["candidates of", "in memory, 1/s", "by disk, 1/s", "ratio", "rewriting", "whole"]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    wanted = args.methods.split(",")
    with tempfile.TemporaryDirectory() as name:
        for space in SPACES:
            if space.replace(",", "") in wanted:
                row = bench(space, args.rows, args.rounds, args.count, Path(name))
                print("| " + " | ".join(row) + " |", flush=True)


def range_names() -> list[str]:
    """How `--methods` names the spaces."""
    return [space.replace(",", "") for space in SPACES]


if __name__ == "__main__":
    main()
