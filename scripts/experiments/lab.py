"""What the experiments share: choosing settings on validation text, comparing on test text.

A *case* is a set of experts and the domains that they are judged on. Settings of each method are
chosen from a small grid by the normalised mean on validation rows; what was chosen is compared on
test rows by `merge_cli.compare`, which measures cost, too. Everything is kept in .cache/experiments
and found again; results go to docs/experiments/NAME.json, tables into docs/experiments.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from family import BASE, DATA, ROOT, WORK

import merge_cli
from merge_cli.comparison.publish import ComparisonResult
from merge_cli.evaluation.result import Cost
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.tasks.loss import LossTask

DOCS = ROOT / "docs" / "experiments"
# Rows of each domain, for about 2,500 tokens to choose on and 6,000 to report on.
_ROWS = {"val": {"math": 40}, "test": {"math": 90}}
_OTHERS = {"val": 9, "test": 20}
Settings = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """Experts to merge: name -> folder, whose name tells them apart in tables.

    Attributes:
        domains: task -> the expert it belongs to.
    """

    name: str
    experts: Mapping[str, Path]
    domains: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return WORK / "cases" / self.name

    def tasks(self, split: str) -> EvalSpec:
        """The loss of every domain on a seeded sample of rows."""
        tasks = tuple(
            LossTask(
                name=domain,
                data=DATA / f"{_text_of(domain)}.{split}.jsonl",
                limit=_ROWS[split].get(_text_of(domain), _OTHERS[split]),
                expert=self.experts[expert].name,
            )
            for domain, expert in self.domains.items()
        )
        return EvalSpec(tasks, device="cpu")


def _text_of(domain: str) -> str:
    return domain.partition("-")[0]


def task_arithmetic(scale: float) -> dict[str, Any]:
    return {"merge_method": "task_arithmetic", "parameters": {"lambda": scale}}


def ties(density: float, scale: float) -> dict[str, Any]:
    return {"merge_method": "ties", "parameters": {"density": density, "lambda": scale}}


def dare(density: float, scale: float) -> dict[str, Any]:
    return {"merge_method": "dare", "parameters": {"density": density, "lambda": scale}}


# With N experts, lambda = 1/N is the uniform soup.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "task arithmetic": [task_arithmetic(scale) for scale in (0.2, 0.4, 0.7, 1.0)],
    "ties": [ties(density, scale) for density in (0.2, 0.5) for scale in (0.5, 1.0)],
    "dare": [dare(0.5, scale) for scale in (0.2, 0.4, 0.7)],
}


def run_case(case: Case, grids: Mapping[str, list[dict[str, Any]]] = GRIDS) -> dict[str, Any]:
    """Choose, merge, compare.

    Returns:
        `models`: those of comparison.json, methods with the settings that were `chosen`;
        `choosing`: what that took;
        `alike`: cosines and relative norms of the task vectors.
    """
    case.folder.mkdir(parents=True, exist_ok=True)
    recipes, chosen, choosing = [], {}, {}
    for method, grid in grids.items():
        best, choosing[method] = (grid[0], _FREE) if len(grid) == 1 else _choose(case, grid)
        recipe = case.folder / f"{method}.yaml"
        _write(case, best, recipe)
        recipes.append(recipe)
        chosen[method] = best.get("parameters", {})
    with _hushed():
        found = merge_cli.compare(
            recipes, case.tasks("test"), case.folder, options=["--quiet", "--device", "cpu"]
        )
    return {
        "case": case.name,
        "experts": {name: folder.parent.name for name, folder in case.experts.items()},
        "alike": _alike(found),
        "chosen": chosen,
        "choosing": choosing,
        "tasks": found.record["tasks"],
        "front": found.record["front"],
        "same": found.record["same"],
        "models": [_slim(model) for model in found.record["models"]],
    }


_FREE = {"merges": 0, "tokens": 0, "seconds": 0.0}


def _choose(case: Case, grid: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """The best of a grid on validation rows by the normalised mean, and what finding it took.

    Base and experts are evaluated for every method; that is counted nowhere.
    """
    spec = case.tasks("val")

    def losses(model: Path) -> tuple[list[float], Cost]:
        with _hushed():
            found = merge_cli.evaluate(model, spec, device="cpu")
        return [task.value for task in found.tasks.values()], found.cost

    zero, _ = losses(BASE)
    one = [losses(case.experts[e])[0][i] for i, e in enumerate(case.domains.values())]
    # A domain whose expert is no better than the base has nothing to share out.
    counted = [i for i, (a, b) in enumerate(zip(zero, one, strict=True)) if b < a]
    spent = dict(_FREE)

    def quality(recipe: dict[str, Any]) -> float:
        file, out = case.folder / "trial.yaml", case.folder / "trial"
        _write(case, recipe, file)
        options = merge_cli.MergeOptions(overwrite=True, fresh=True, statistics=False, device="cpu")
        merged = merge_cli.merge(file, out, options=options).report["cost"]
        got, cost = losses(out)
        spent["merges"] += 1
        spent["tokens"] += cost.tokens
        spent["seconds"] += cost.seconds + merged["seconds"]
        return mean((zero[i] - got[i]) / (zero[i] - one[i]) for i in counted)

    return max(grid, key=quality), spent


def _write(case: Case, recipe: Mapping[str, Any], file: Path) -> None:
    # To slerp a base would be a third model.
    base = {} if recipe["merge_method"] == "slerp" else {"base_model": str(BASE)}
    document = {
        **recipe,
        **base,
        "models": [{"model": str(folder)} for folder in case.experts.values()],
        "dtype": "bfloat16",
    }
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def _alike(found: ComparisonResult) -> dict[str, Any]:
    """From the report of task arithmetic, which looks at task vectors."""
    place = Path(found.comparison["task arithmetic 0.4"].place)
    report = place / "merge_report.json"
    total = json.loads(report.read_text(encoding="utf-8"))["statistics"]["total"]
    size = len(total["norm"])
    pairs = [total["cosine"][i][j] for i in range(size) for j in range(i + 1, size)]
    return {
        "cosine": mean(pairs),
        "relative_norm": mean(total["relative_norm"]),
        "conflict": total["conflict"],
    }


def _slim(model: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "role", "scores", "normalised", "mean", "normalised_mean", "gain", "cost")
    return {key: model[key] for key in kept}


@contextlib.contextmanager
def _hushed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def of(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One model of a case's result."""
    wanted = result["same"].get(name, name)
    found: Mapping[str, Any] = next(m for m in result["models"] if m["name"] == wanted)
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and least to largest over seeds."""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text.replace("-", "−")


def keep(name: str, results: Sequence[Mapping[str, Any]], command: str) -> None:
    """The raw numbers, for whoever wants to draw them otherwise."""
    DOCS.mkdir(parents=True, exist_ok=True)
    document = {"command": command, "cases": results}
    text = json.dumps(document, indent=1, ensure_ascii=False)
    # Six digits are more than an interval leaves standing.
    text = re.sub(r"-?\d+\.\d{7,}(?:e-?\d+)?", lambda m: f"{float(m[0]):.6g}", text)
    (DOCS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def publish(name: str, text: str) -> None:
    """Put generated text between <!-- NAME --> and <!-- /NAME --> of docs/experiments.md."""
    page = ROOT / "docs" / "experiments.md"
    marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    before = page.read_text(encoding="utf-8")
    after, count = re.subn(marks, lambda m: f"{m[1]}{text}\n{m[2]}", before, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page} has no place for {name}")
    page.write_text(after, encoding="utf-8")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(run: Callable[[Sequence[int]], None], about: str) -> None:
    """The command line of every experiment."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ.setdefault("MERGE_CLI_CACHE", str(WORK / "cache"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(options.threads)
    run(options.seeds)
    print("docs/experiments.md is up to date", file=sys.stderr)
