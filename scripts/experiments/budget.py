"""DAM and evolutionary search at equal cost in tokens, on the model family in zoo/.

    python scripts/experiments/budget.py            # about 35 minutes on one idle core
    python scripts/experiments/budget.py --report   # the tables again

Experts japanese, math and code. DAM learns one coefficient for each tensor (task vectors) from rows
of the train split; its cost is counted, and CMA-ES over task arithmetic gets as many candidates as
that cost pays for. Both have the same goal (KL of each expert on its own data), choose on rows of
the validation split, and are measured on the test split by `merge_cli.evaluate`.

Cost is in tokens through one model, forward: a backward pass counts as two of them. Teachers count
once for each token that they are asked about. Measuring the result counts for nobody.

Writes docs/experiments/budget.json, budget.svg, and the tables in budget.md. matplotlib draws (the
extra `experiments`). What is finished is kept in --work and not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from dam import DOCS, EXPERTS, LEARNED, ROOT, SEEDS, ZOO, Experiment, learned_recipe, static_recipe

DAM = "DAM, a coefficient for each tensor"
SPACES: dict[str, dict[str, Any]] = {
    "search, a weight for each expert": {},
    "search, weights by 4 groups of layers and 3 kinds": {
        "layer_groups": 4,
        "filters": ["self_attn", "mlp"],
    },
}
STATIC = {
    "uniform soup": {"method": "soup"},
    "task arithmetic (lambda 0.1)": {"method": "task_arithmetic", "lambda": 0.1},
}
# Examples of each expert: 240 are 60 steps.
BUDGETS = (80, 240)
ROWS = {
    "train": {"japanese": 3, "math": 30, "code": 3},
    "val": {"japanese": 6, "math": 60, "code": 6},
}
LENGTH, FINALISTS, FORWARD_AND_BACKWARD = 128, 3, 3


def dam_cost(training: Mapping[str, Any]) -> int:
    """Forward tokens that a training took, teachers and held-out measurements included."""
    held_out = sum(one["held_out_tokens"] for one in training["datasets"])
    asked = sum(one["train_tokens"] for one in training["datasets"]) + held_out
    measured = len(training["measured"]) * held_out
    return int(FORWARD_AND_BACKWARD * training["cost"]["tokens"] + asked + measured)


def learn(experiment: Experiment, examples: int, seed: int) -> dict[str, Any]:
    recipe = learned_recipe(LEARNED["one coefficient for each tensor"], seed)
    recipe["training"]["examples"] = examples
    out, report = experiment.merge(f"dam-{examples}-{seed}", recipe)
    training = report["training"]
    return {
        "tokens": dam_cost(training),
        "numbers": training["coefficients"],
        "seconds": training["cost"]["seconds"] + training["cost"]["teaching_seconds"],
        "tried": training["steps"],
        **experiment.score(out, "test", loss=True),
    }


def tasks(split: str, word: str) -> Iterator[dict[str, Any]]:
    for name, rows in ROWS[split].items():
        yield {
            "task": "kl",
            "teacher": str(ZOO / name),
            "top_k": 64,
            "limit": rows,
            "split": word,
            "data": str(ZOO / "data" / f"{name}.{split}.jsonl"),
        }


def search(
    experiment: Experiment, space: str, budget: int, examples: int, seed: int
) -> dict[str, Any]:
    """As many candidates as the budget pays for."""
    number = tuple(SPACES).index(space)
    price = experiment.once(f"prices, seed {seed}", lambda: prices(experiment, space, seed))
    left = budget - price["teachers"] - FINALISTS * price["validation"]
    evaluations = max(4, left // price["candidate"])
    out, found = _run(experiment, space, evaluations, f"{number}-{examples}-{seed}", seed)
    return {
        # What a search of its own pays: another one may have asked the teachers before.
        "tokens": price["teachers"]
        + evaluations * price["candidate"]
        + FINALISTS * price["validation"],
        "numbers": len(found["genes"]),
        "seconds": found["cost"]["seconds"],
        "tried": found["cost"]["evaluations"],
        **experiment.score(out, "test", loss=True),
    }


def prices(experiment: Experiment, space: str, seed: int) -> dict[str, int]:
    """Tokens of a candidate, of a finalist, and of the teachers, by the journal of a small search.

    Teachers are asked once, with the first candidate of either split.
    """
    out, _ = _run(experiment, space, 4, f"prices-{seed}", seed)
    lines = [json.loads(line) for line in (out / "search_journal.jsonl").read_text().splitlines()]
    spent: dict[str, list[int]] = {"candidate": [], "validation": []}
    for line in lines:
        if line.get("kind") in spent:
            spent[line["kind"]].append(line["tokens"])
    teachers = sum(tokens[0] - tokens[1] for tokens in spent.values())
    return {"teachers": teachers, **{kind: tokens[1] for kind, tokens in spent.items()}}


def _run(
    experiment: Experiment, space: str, evaluations: int, name: str, seed: int
) -> tuple[Path, dict[str, Any]]:
    # Where DAM's coefficients begin, too.
    start = experiment.work / "start.yaml"
    recipe = static_recipe({"method": "task_arithmetic"}, seed)
    start.write_text(yaml.safe_dump({**recipe, "parameters": {"weight": 0.3}}))
    recipe = {
        **static_recipe({"method": "evolutionary"}, seed),
        "search": {
            "method": "task_arithmetic",
            "parameters": {"weight": {"min": 0.0, "max": 1.2}},
            "evaluations": evaluations,
            "finalists": FINALISTS,
            "start": str(start),
            **SPACES[space],
        },
        "objective": {
            "max_length": LENGTH,
            "seed": seed,
            "tasks": [*tasks("train", "search"), *tasks("val", "validation")],
        },
    }
    out, report = experiment.merge(f"search-{name}", recipe)
    return out, report["search"]


def run_all(experiment: Experiment) -> None:
    for name, setting in STATIC.items():

        def static(setting: Any = setting) -> dict[str, Any]:
            out, _ = experiment.merge("-".join(map(str, setting.values())), static_recipe(setting))
            return experiment.score(out, "test", loss=True)

        experiment.once(name, static)
    for seed in SEEDS:
        for examples in BUDGETS:
            dam = experiment.once(
                f"{DAM}: {examples}, seed {seed}",
                lambda e=examples, s=seed: learn(experiment, e, s),
            )
            for space in SPACES:

                def found(
                    space: str = space,
                    budget: int = dam["tokens"],
                    examples: int = examples,
                    seed: int = seed,
                ) -> dict[str, Any]:
                    return search(experiment, space, budget, examples, seed)

                experiment.once(f"{space}: {examples}, seed {seed}", found)


def runs_of(results: Mapping[str, Any], way: str, examples: int) -> list[dict[str, Any]]:
    keys = [f"{way}: {examples}, seed {seed}" for seed in SEEDS]
    return [results[key] for key in keys if key in results]


def mean_of(run: Mapping[str, float], kind: str) -> float:
    return mean(run[f"{kind} {name}"] for name in EXPERTS)


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "| way | numbers | tried | tokens | seconds | KL, test | loss, test |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in STATIC:
        run = results[name]
        lines.append(
            f"| {name} | – | – | 0 | – | {mean_of(run, 'kl'):.4f} | {mean_of(run, 'loss'):.4f} |"
        )
    for examples in BUDGETS:
        for way in (DAM, *SPACES):
            runs = runs_of(results, way, examples)
            if not runs:
                continue
            cells = [_spread([mean_of(run, kind) for run in runs]) for kind in ("kl", "loss")]
            tried = (
                f"{mean(r['tried'] for r in runs):.0f} {'steps' if way == DAM else 'candidates'}"
            )
            lines.append(
                f"| {way} | {runs[0]['numbers']} | {tried} "
                f"| {mean(r['tokens'] for r in runs):,.0f} "
                f"| {mean(r['seconds'] for r in runs):.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f} (one seed)"
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def draw(results: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "merge-cli"
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, way in enumerate((DAM, *SPACES)):
        points = [
            (mean(r["tokens"] for r in runs), [mean_of(r, "kl") for r in runs])
            for examples in BUDGETS
            if (runs := runs_of(results, way, examples))
        ]
        heights = [mean(values) for _, values in points]
        spread = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar(
            [x for x, _ in points],
            heights,
            spread,
            label=way,
            marker="o",
            capsize=3,
            color=f"C{number}",
        )
    for name, style in zip(STATIC, (":", "--"), strict=True):
        axes.axhline(mean_of(results[name], "kl"), color="tab:gray", linestyle=style, label=name)
    axes.set_xlabel("tokens through one model, forward (a backward pass counts as two)")
    axes.set_ylabel("mean KL(expert ‖ model) on test, nats")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(DOCS / "budget.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "budget")
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    given = parser.parse_args()
    experiment = Experiment(given.work)
    if not given.report:
        import torch

        torch.set_num_threads(1)
        run_all(experiment)
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "budget.json").write_text(json.dumps(experiment.results, indent=1) + "\n")
    draw(experiment.results)
    page = DOCS / "budget.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- results -->")
    _, _, tail = rest.partition("<!-- end of results -->")
    shown = f"<!-- results -->\n{table(experiment.results)}\n<!-- end of results -->"
    page.write_text(f"{head}{shown}{tail}", encoding="utf-8")
    print(table(experiment.results))


if __name__ == "__main__":
    main()
