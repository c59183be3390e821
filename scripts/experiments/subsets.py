"""Rows chosen by information against random rows: how well do they rank a search's candidates?

    python scripts/experiments/subsets.py             # 2 minutes of CPU
    python scripts/experiments/subsets.py --report    # the tables again, from the kept losses

Task arithmetic of the zoo's japanese, math and code experts. Each row's loss is measured for the 15
static merges that each search begins with, and for candidates: 12 with random weights of 0 to 0.8,
and 12 near the best of these, as at the end of a search. Rows are chosen by what the static merges
say, as a search could, from a pool: three quarters of the rows, drawn 300 times. Candidates are
ranked by the chosen rows and by all rows.

A row's loss is modelled as difficulty + discrimination * ability of the merge + noise: the item
response model for numbers instead of right answers (the first principal component of the static
merges' losses). Its information is discrimination² / noise², as of a 2PL. "estimate" predicts the
mean of all rows from the ability that the chosen rows say, as mergenetic (arXiv:2505.11427) does.

Writes docs/experiments/subsets.json and the tables in subsets.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
ZOO, DOCS = ROOT / "zoo", ROOT / "docs" / "experiments"
EXPERTS = ("japanese", "math", "code")
ROWS = {"japanese": 16, "math": 48, "code": 16}
SIZES, DRAWS, SPREAD, CLOSE = (2, 4, 8), 300, 12, 12
Array = Any


def recipe_of(work: Path) -> Path:
    document = {
        "merge_method": "evolutionary",
        "base_model": str(ZOO / "base"),
        "models": [str(ZOO / name) for name in EXPERTS],
        "search": {"method": "task_arithmetic", "rows": 0},
        "objective": {
            "max_length": 128,
            "tasks": [
                {"task": "loss", "data": str(ZOO / "data" / f"{name}.val.jsonl"), "limit": rows}
                for name, rows in ROWS.items()
            ],
        },
        "dtype": "bfloat16",
    }
    path = work / "subsets.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def measure(work: Path) -> dict[str, Any]:
    """Loss and tokens of every row, for every merge."""
    from merge_cli.evolve.evaluator import Evaluator
    from merge_cli.evolve.jobs import EvaluationJob, Setup
    from merge_cli.evolve.plan import plan_search
    from merge_cli.options import MergeOptions
    from merge_cli.planning.planner import load_recipe, make_plan

    options = MergeOptions(device="cpu", threads=1)
    decided = plan_search(make_plan(load_recipe(recipe_of(work))), options)
    assert decided.space is not None
    evaluator = Evaluator(Setup(decided.static(), decided.objective, options))
    names = [goal.task for goal in decided.objective.search.weighted]
    merges: list[dict[str, Any]] = []

    def add(kind: str, recipe: Any, genome: Sequence[float]) -> None:
        outcome = evaluator.answer(EvaluationJob(len(merges), recipe, keep_examples=True))
        if outcome.error:
            raise SystemExit(outcome.error)
        parts = [[round(p, 4) for p in metric.parts] for metric in outcome.metrics]
        tokens = [list(metric.weights) for metric in outcome.metrics]
        merges.append({"kind": kind, "genome": list(genome), "parts": parts, "tokens": tokens})
        print(len(merges), kind, flush=True)

    for merge in decided.statics:
        add("static", merge.recipe, merge.genome)
    random = np.random.default_rng(0)
    for genome in random.uniform(0, 0.8, (SPREAD, len(EXPERTS))).tolist():
        add("spread", decided.space.recipe(genome), genome)
    best = min(merges, key=lambda one: full_score(one["parts"], one["tokens"]))
    center = np.array(best["genome"] or [1 / len(EXPERTS)] * len(EXPERTS))
    for genome in np.clip(center + random.normal(0, 0.05, (CLOSE, len(EXPERTS))), 0, 1).tolist():
        add("close", decided.space.recipe(genome), genome)
    evaluator.close()
    tokens = merges[0]["tokens"]
    assert all(one.pop("tokens") == tokens for one in merges)
    return {"tasks": names, "tokens": tokens, "merges": merges}


def full_score(parts: Sequence[Sequence[float]], tokens: Sequence[Sequence[float]]) -> float:
    return float(np.mean([sum(p) / sum(t) for p, t in zip(parts, tokens, strict=True)]))


class Losses:
    """One task: losses per token of merges (rows of the matrix) on rows (columns)."""

    def __init__(self, parts: Array, tokens: Array, static: Array) -> None:
        self.loss, self.tokens = parts / tokens, tokens
        known = self.loss[static]
        self.difficulty = known.mean(axis=0)
        left = known - self.difficulty
        # The ability of each static merge is weighted by tokens, as the score is.
        u, s, vt = np.linalg.svd(left * np.sqrt(tokens), full_matrices=False)
        self.discrimination = s[0] * vt[0] / np.sqrt(tokens)
        noise = left - np.outer(u[:, 0], self.discrimination)
        self.noise = (noise**2).mean(axis=0) + 1e-12
        self.variance = known.var(axis=0)

    @property
    def full(self) -> Array:
        return self.mean(np.arange(len(self.tokens)))

    @property
    def information(self) -> Array:
        return self.discrimination**2 / self.noise

    def mean(self, rows: Array) -> Array:
        """Each merge's loss per token on some rows."""
        return self.loss[:, rows] @ self.tokens[rows] / self.tokens[rows].sum()

    def estimate(self, rows: Array) -> Array:
        """Each merge's loss on all rows, by the ability that some rows say."""
        a, weight = self.discrimination[rows], 1 / self.noise[rows]
        left = self.loss[:, rows] - self.difficulty[rows]
        ability = left @ (weight * a) / ((weight * a) @ a + 1e-9)
        total = self.tokens.sum()
        return (
            self.difficulty @ self.tokens + ability * (self.discrimination @ self.tokens)
        ) / total


Choose = Callable[[Losses, int, Array], Array]  # rows of a pool, which is in random order


def _first(task: Losses, size: int, pool: Array) -> Array:
    return pool[:size]


def _varied(task: Losses, size: int, pool: Array) -> Array:
    return pool[np.argsort(-task.variance[pool], kind="stable")[:size]]


def _informative(task: Losses, size: int, pool: Array) -> Array:
    return pool[np.argsort(-task.information[pool], kind="stable")[:size]]


WAYS: dict[str, tuple[Choose, bool]] = {
    "random rows": (_first, False),
    "random rows, estimate": (_first, True),
    "largest variance": (_varied, False),
    "most information": (_informative, False),
    "most information, estimate": (_informative, True),
}


def ranks(values: Array) -> Array:
    return np.argsort(np.argsort(values))


def summary(tasks: Sequence[Losses], chosen: Array) -> list[dict[str, Any]]:
    """Rank correlation with all rows, and what the best by the chosen rows lose, by way and size.

    Args:
        chosen: the candidates' numbers.
    """
    full = np.mean([task.full for task in tasks], axis=0)[chosen]
    result = []
    for size in SIZES:
        for name, (choose, is_estimate) in WAYS.items():
            random = np.random.default_rng(0)
            correlations, best, five, tokens = [], [], [], []
            for _ in range(DRAWS):
                rows = []
                for task in tasks:
                    count = len(task.tokens)
                    rows.append(choose(task, size, random.permutation(count)[: 3 * count // 4]))
                scores = [
                    task.estimate(r) if is_estimate else task.mean(r)
                    for task, r in zip(tasks, rows, strict=True)
                ]
                score = np.mean(scores, axis=0)[chosen]
                order = np.argsort(score, kind="stable")
                correlations.append(np.corrcoef(ranks(score), ranks(full))[0, 1])
                best.append(full[order[0]] - full.min())
                five.append(full[order[:5]].min() - full.min())
                tokens.append(sum(t.tokens[r].sum() for t, r in zip(tasks, rows, strict=True)))
            result.append(
                {
                    "rows": size,
                    "way": name,
                    "tokens": float(np.mean(tokens)),
                    "correlation": float(np.mean(correlations)),
                    "low": float(np.quantile(correlations, 0.05)),
                    "lost": float(np.mean(best)),
                    "lost of five": float(np.mean(five)),
                }
            )
    return result


def table(measured: dict[str, Any]) -> str:
    """The tables of subsets.md."""
    kinds = np.array([one["kind"] for one in measured["merges"]])
    static = np.flatnonzero(kinds == "static")
    tasks = [
        Losses(
            np.array([one["parts"][i] for one in measured["merges"]]),
            np.array(measured["tokens"][i]),
            static,
        )
        for i in range(len(measured["tasks"]))
    ]
    lines = []
    for kind, words in (("spread", "far apart"), ("close", "close together")):
        lines += [
            f"{SPREAD if kind == 'spread' else CLOSE} candidates {words}:",
            "",
            "| rows a task | chosen | tokens | rank correlation (5 % of draws below) "
            "| lost by the best | lost by the best of five |",
            "|---:|---|---:|---:|---:|---:|",
        ]
        for one in summary(tasks, np.flatnonzero(kinds == kind)):
            lines.append(
                f"| {one['rows']} | {one['way']} | {one['tokens']:,.0f} "
                f"| {one['correlation']:.3f} ({one['low']:.3f}) | {one['lost']:.4f} "
                f"| {one['lost of five']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "subsets")
    parser.add_argument("--report", action="store_true", help="write the tables again")
    args = parser.parse_args()
    kept = DOCS / "subsets.json"
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(measure(args.work)) + "\n", encoding="utf-8")
    page = DOCS / "subsets.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- results -->")
    _, _, tail = rest.partition("<!-- end of results -->")
    text = table(json.loads(kept.read_text(encoding="utf-8")))
    page.write_text(
        f"{head}<!-- results -->\n{text}\n<!-- end of results -->{tail}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
