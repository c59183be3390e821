"""Evolutionary search against a grid of the same method, on the model family in zoo/.

    python scripts/experiments/evolve.py            # about 10 minutes on two idle cores
    python scripts/experiments/evolve.py --report   # the tables again

Experts japanese, math and code. For each method and seed: CMA-ES over a weight for each expert (and
for dare_ties one density), 100 candidates; and a grid of five scales of the same method. Both are
chosen by the mean loss on the same rows of the validation split, and reported on rows of the test
split. The seed decides the rows, the optimizer and DARE's masks. Each search is a process with
one thread; finished ones are kept in --work and not done again.

Writes docs/experiments/evolve.json and the tables in evolve.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

import merge_cli
from merge_cli.engine.merge import MergeOptions
from merge_cli.evaluation.tasks import LossTask

ROOT = Path(__file__).resolve().parents[2]
ZOO, DOCS = ROOT / "zoo", ROOT / "docs" / "experiments"
EXPERTS = ("japanese", "math", "code")
SEEDS = (0, 1, 2)
SCALES = (0.2, 0.35, 0.5, 0.7, 1.0)
ROWS = {
    "val": {"japanese": 3, "math": 30, "code": 3},
    "test": {"japanese": 12, "math": 120, "code": 12},
}
LENGTH = 128
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": {"min": 0.0, "max": 1.2}},
    "dare_ties": {
        "weight": {"min": 0.0, "max": 1.2},
        "density": {"min": 0.3, "max": 1.0, "tied": "models"},
    },
}
FIXED = {"task_arithmetic": {}, "dare_ties": {"density": 0.5}}


def tasks(split: str, word: str) -> list[dict[str, Any]]:
    """The loss of each domain, as an objective lists it."""
    return [
        {
            "task": "loss",
            "data": str(ZOO / "data" / f"{domain}.{split}.jsonl"),
            "limit": rows,
            "split": word,
        }
        for domain, rows in ROWS[split].items()
    ]


def document(method: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(ZOO / "base"),
        "models": [{"model": str(ZOO / expert)} for expert in EXPERTS],
        "dtype": "bfloat16",
        "seed": seed,
        **more,
    }


def search(
    method: str, seed: int, evaluations: int, work: Path, label: str = "", **more: Any
) -> dict[str, Any]:
    """One search by the command line, and what its report says.

    Args:
        label, more: another search section, and its name.
    """
    out = work / f"{method}-{seed}-{evaluations}{label}"
    if not out.exists():
        recipe = out.with_suffix(".yaml")
        section = {
            "method": method,
            "parameters": METHODS[method],
            "evaluations": evaluations,
            **more,
        }
        objective = {
            "max_length": LENGTH,
            "seed": seed,
            "tasks": [*tasks("val", "search"), *tasks("test", "test")],
        }
        recipe.write_text(
            yaml.safe_dump(document("evolutionary", seed, search=section, objective=objective))
        )
        command = [
            sys.executable,
            "-m",
            "merge_cli",
            "run",
            str(recipe),
            str(out),
            "--quiet",
            "--device",
            "cpu",
            "--threads",
            "1",
        ]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))["search"]
    return {
        "search": found["best"]["score"],
        "first": found["history"][0]["score"],
        "test": found["scores"]["found"]["score"],
        "static": {
            Path(name).name if "/" in name else name: one["score"]
            for name, one in found["scores"].items()
        },
        "best_after": [one["best"] for one in found["history"]],
        "values": found["best"]["values"],
        "history": [{"score": one["score"], "share": one["share"]} for one in found["history"]],
        "cost": found["cost"],
    }


def grid(method: str, seed: int, work: Path) -> dict[str, Any]:
    """Five scales of the method; the best on validation rows, reported on test rows."""
    kept = work / f"grid-{method}-{seed}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    points = []
    for scale in SCALES:
        recipe = work / f"grid-{method}-{seed}.yaml"
        recipe.write_text(
            yaml.safe_dump(document(method, seed, parameters={"lambda": scale, **FIXED[method]}))
        )
        options = MergeOptions(overwrite=True, fresh=True, statistics=False, device="cpu")
        out = merge_cli.merge(recipe, work / f"grid-{method}-{seed}", options=options).path
        point: dict[str, Any] = {"lambda": scale, "tokens": 0, "seconds": 0.0}
        for split in ("val", "test"):
            found = merge_cli.evaluate(
                out,
                [
                    LossTask(name=domain, data=ZOO / "data" / f"{domain}.{split}.jsonl", limit=rows)
                    for domain, rows in ROWS[split].items()
                ],
                device="cpu",
                seed=seed,
                max_length=LENGTH,
                threads=1,
            )
            point[split] = mean(task.value for task in found.tasks.values())
            if split == "val":
                point["tokens"] += found.cost.tokens
                point["seconds"] += found.cost.seconds
        points.append(point)
    best = min(points, key=lambda point: point["val"])
    result = {"points": points, "best": best, "tokens": sum(p["tokens"] for p in points)}
    kept.write_text(json.dumps(result), encoding="utf-8")
    return result


def tables(results: Mapping[str, Any]) -> str:
    """What the page shows."""
    lines = [
        "| method | seed | grid, val | found, val | grid, test | found, test | difference, test |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in results["runs"].items():
        for seed, run in runs.items():
            found, best = run["search"], run["grid"]["best"]
            difference = found["test"] - best["test"]
            lines.append(
                f"| {method} | {seed} | {best['val']:.4f} (λ {best['lambda']:g}) "
                f"| {found['search']:.4f} | {best['test']:.4f} | {found['test']:.4f} "
                f"| {difference:+.4f} |".replace("| -", "| −")
            )
    lines += [
        "",
        "| method | candidates | wall time | candidates/s | tokens | tokens of the grid | "
        "candidates until the grid was beaten on val |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in results["runs"].items():
        costs = [run["search"]["cost"] for run in runs.values()]
        until = [_until(run) for run in runs.values()]
        lines.append(
            f"| {method} | {costs[0]['evaluations']} "
            f"| {mean(c['wall_seconds'] for c in costs):.0f} s "
            f"| {mean(c['evaluations'] / c['seconds'] for c in costs):.2f} "
            f"| {mean(c['tokens'] for c in costs):,.0f} "
            f"| {mean(run['grid']['tokens'] for run in runs.values()):,.0f} "
            f"| {', '.join(until)} |"
        )
    static = next(iter(results["runs"]["task_arithmetic"].values()))["search"]["static"]
    others = [f"{name} {value:.4f}" for name, value in static.items() if name != "found"]
    lines += ["", f"Without a search, on the test rows of seed 0: {', '.join(others)}."]
    return "\n".join(lines)


def _until(run: Mapping[str, Any]) -> str:
    target = run["grid"]["best"]["val"]
    scores: Sequence[float | None] = run["search"]["best_after"]
    place = next((i + 1 for i, s in enumerate(scores) if s is not None and s < target), None)
    return str(place) if place else "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "evolve")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="write the tables again")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    place = DOCS / "evolve.json"
    if not args.report:
        pairs = [(method, seed) for seed in SEEDS for method in METHODS]
        with ThreadPoolExecutor(args.processes) as pool:
            found = list(pool.map(lambda p: search(*p, args.evaluations, args.work), pairs))
        runs: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
        for (method, seed), one in zip(pairs, found, strict=True):
            runs[method][str(seed)] = {"search": one, "grid": grid(method, seed, args.work)}
        place.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    results = json.loads(place.read_text(encoding="utf-8"))
    page = DOCS / "evolve.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- results -->")
    _, _, tail = rest.partition("<!-- end of results -->")
    text = f"{head}<!-- results -->\n{tables(results)}\n<!-- end of results -->{tail}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
