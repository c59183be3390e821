"""RegMean and Fisher merging in several settings beside soup and task arithmetic, on zoo/.

    python scripts/experiments/examples.py              # about 20 minutes on one core
    python scripts/experiments/examples.py --report     # tables again

The japanese, math and code experts on rows of the test split: loss in nats per token, and KL(expert
|| model) on each expert's own text. Statistics see the train split. Nothing is chosen but task
arithmetic's lambda, on the validation split: all settings of the two methods are shown.

Writes docs/experiments/statistics.json and the tables in statistics.md. What is finished is kept in
--work and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from family import ROOT

import merge_cli
from merge_cli.engine.merge import MergeOptions
from merge_cli.evaluation.task import Task
from merge_cli.evaluation.tasks import KL, LossTask

ZOO, DOCS = ROOT / "zoo", ROOT / "docs" / "experiments"
EXPERTS, SEEDS = ("japanese", "math", "code"), (0, 1, 2)
# Rows of each data set: maths rows are short. About as many tokens of each.
VAL_ROWS = {"japanese": 12, "math": 80, "code": 12}
TEST_ROWS = {"japanese": 24, "math": 160, "code": 24}
LENGTH, WINDOW = 128, 256  # tokens that are learned from, and measured, at a time
TASK_ARITHMETIC = "task arithmetic"
LAMBDAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
SOUP_WITH_BASE = "uniform soup, base among the sources"
# Name -> method, parameters, statistics; `base` puts the base among the sources, with English text.
SETTINGS: dict[str, dict[str, Any]] = {
    **{
        f"RegMean, alpha {a:g}": {"method": "regmean", "parameters": {"alpha": a}}
        for a in (0.1, 0.5, 0.9, 1.0)
    },
    "RegMean, alpha 0.9, base among the sources": {"method": "regmean", "base": True},
    "Fisher": {"method": "fisher"},
    "Fisher, sampled labels": {"method": "fisher", "statistics": {"targets": "sampled"}},
    "Fisher, normalize sum": {"method": "fisher", "parameters": {"normalize": "sum"}},
    "Fisher, normalize none": {"method": "fisher", "parameters": {"normalize": "none"}},
    "Fisher, base among the sources": {"method": "fisher", "base": True},
}
# Name -> whose embedding (the tied head), whose layers: where what a merge gains comes from.
HYBRIDS = {
    "Fisher's embedding, the soup's layers": ("Fisher", "uniform soup"),
    "the soup's embedding, Fisher's layers": ("uniform soup", "Fisher"),
    "Fisher's embedding, RegMean's layers": ("Fisher", "RegMean, alpha 0.9"),
}
SEVERAL = ("RegMean, alpha 0.9", "Fisher")  # over seeds, and over numbers of examples
EXAMPLES = 256
COUNTS = (4, 16, 64, 256)


class Experiment:
    """What is measured once is kept: models in `work`, numbers in results.json."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self._file = work / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def once(self, key: str, make: Any) -> Any:
        if key not in self.results:
            began = time.monotonic()
            self.results[key] = make()
            self._file.write_text(json.dumps(self.results, indent=1))
            print(f"{key}: {time.monotonic() - began:.0f} s", flush=True)
        return self.results[key]

    def merge(self, name: str, recipe: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        out = self.work / "models" / name
        if out.exists():
            return out, json.loads((out / "merge_report.json").read_text())
        out.parent.mkdir(exist_ok=True)
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        options = MergeOptions(device="cpu", threads=1, statistics=False)
        result = merge_cli.merge(path, out, options=options)
        return out, result.report

    def score(self, model: Path, split: str, *, loss: bool) -> dict[str, Any]:
        rows = TEST_ROWS if split == "test" else VAL_ROWS
        tasks: list[Task] = []
        for name in EXPERTS:
            data = ZOO / "data" / f"{name}.{split}.jsonl"
            about: dict[str, Any] = {"data": data, "limit": rows[name]}
            tasks.append(KL(name=f"kl {name}", teacher=str(ZOO / name), **about))
            if loss:
                tasks.append(LossTask(name=f"loss {name}", **about))
        found = merge_cli.evaluate(model, tasks, device="cpu", max_length=WINDOW)
        return {name: task.value for name, task in found.tasks.items()}


def static_recipe(setting: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    method = setting["method"]
    own = {k: v for k, v in setting.items() if k == "density"}
    return {
        "merge_method": method,
        **({} if method == "soup" else {"base_model": str(ZOO / "base")}),
        "models": [
            {"model": str(ZOO / name), **({"parameters": own} if own else {})} for name in EXPERTS
        ],
        **({"parameters": {"lambda": setting["lambda"]}} if "lambda" in setting else {}),
        "dtype": "float32",
        "seed": seed,
    }


def recipe_of(setting: Mapping[str, Any], seed: int, examples: int) -> dict[str, Any]:
    data = {name: f"{name}.train.jsonl" for name in EXPERTS}
    if setting.get("base"):
        data["base"] = "english.train.jsonl"
    return {
        "merge_method": setting["method"],
        "models": [
            {"model": str(ZOO / name), "data": str(ZOO / "data" / file)}
            for name, file in data.items()
        ],
        "parameters": setting.get("parameters", {}),
        "statistics": {"examples": examples, "max_length": LENGTH, **setting.get("statistics", {})},
        "dtype": "float32",
        "seed": seed,
    }


def soup_with_base() -> dict[str, Any]:
    recipe = static_recipe({"method": "soup"})
    return {**recipe, "models": [*recipe["models"], {"model": str(ZOO / "base")}]}


def runs() -> Iterator[tuple[str, int, int]]:
    """Setting, seed, examples."""
    for name in SETTINGS:
        for seed in SEEDS if name in SEVERAL else SEEDS[:1]:
            yield name, seed, EXAMPLES
    for name in SEVERAL:
        for count in COUNTS[:-1]:
            for seed in SEEDS:
                yield name, seed, count


def key_of(name: str, seed: int, examples: int) -> str:
    return f"test {name} seed {seed} examples {examples}"


def run_all(experiment: Experiment) -> None:
    for name in ("base", *EXPERTS):
        experiment.once(f"test {name}", lambda n=name: experiment.score(ZOO / n, "test", loss=True))
    for scale in LAMBDAS:

        def on_val(scale: float = scale) -> dict[str, Any]:
            setting = {"method": "task_arithmetic", "lambda": scale}
            out, _ = experiment.merge(f"task_arithmetic-{scale:g}", static_recipe(setting))
            return {"setting": setting, **experiment.score(out, "val", loss=False)}

        experiment.once(f"val {TASK_ARITHMETIC}: task_arithmetic {scale:g}", on_val)
    best = best_setting(experiment.results)
    fixed = {
        "uniform soup": static_recipe({"method": "soup"}),
        SOUP_WITH_BASE: soup_with_base(),
        TASK_ARITHMETIC: static_recipe(best),
    }
    for name, recipe in fixed.items():
        _measure(experiment, f"test {name}", recipe)
    for name, seed, examples in runs():
        recipe = recipe_of(SETTINGS[name], seed, examples)
        _measure(experiment, key_of(name, seed, examples), recipe)

    for name, (embedding, layers) in HYBRIDS.items():

        def measure(embedding: str = embedding, layers: str = layers) -> dict[str, Any]:
            folders = [experiment.work / "models" / file_of(one) for one in (embedding, layers)]
            return experiment.score(hybrid(*folders, experiment.work), "test", loss=True)

        experiment.once(f"test {name}", measure)


def best_setting(results: Mapping[str, Any]) -> dict[str, Any]:
    """Task arithmetic's setting with the lowest mean KL on the validation split."""
    tried = [value for key, value in results.items() if key.startswith(f"val {TASK_ARITHMETIC}:")]
    return dict(min(tried, key=lambda scores: mean_of(scores, "kl"))["setting"])


def hybrid(embedding: Path, layers: Path, work: Path) -> Path:
    """A model with one merge's embedding and another's everything else."""
    from safetensors.torch import load_file, save_file

    out = work / "models" / f"{embedding.name}+{layers.name}"
    shutil.copytree(layers, out, dirs_exist_ok=True)
    tensors = load_file(layers / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = load_file(embedding / "model.safetensors")[name]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def file_of(name: str) -> str:
    """The folder of a merge's result."""
    key = key_of(name, SEEDS[0], EXAMPLES) if name in SETTINGS else f"test {name}"
    return key.replace(" ", "-").replace(",", "")


def _measure(experiment: Experiment, key: str, recipe: Mapping[str, Any]) -> None:
    def measure() -> dict[str, Any]:
        out, report = experiment.merge(key.replace(" ", "-").replace(",", ""), recipe)
        found = report.get("gathered", {})
        cost = {"cost": found["cost"], "means": found["means"]} if found else {}
        return {**cost, **experiment.score(out, "test", loss=True)}

    experiment.once(key, measure)


def table(results: Mapping[str, Any]) -> str:
    """Markdown: every merge on every expert's text; means over seeds where there are several."""
    heads = [f"loss {n}" for n in EXPERTS] + ["loss mean", "KL mean"]
    lines = [f"| model | seeds | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]
    best = best_setting(results)["lambda"]
    shown = {TASK_ARITHMETIC: f"task arithmetic, lambda {best:g}"}
    plain = ("base", *EXPERTS, "uniform soup", SOUP_WITH_BASE, TASK_ARITHMETIC)
    for name in (*plain, *SETTINGS, *HYBRIDS):
        keys = (
            [key_of(name, seed, EXAMPLES) for seed in SEEDS]
            if name in SETTINGS
            else [f"test {name}"]
        )
        found = [results[key] for key in keys if key in results]
        cells = [cell([one[f"loss {n}"] for one in found]) for n in EXPERTS]
        cells += [
            cell([mean_of(one, "loss") for one in found]),
            cell([mean_of(one, "kl") for one in found], 4),
        ]
        lines.append(f"| {shown.get(name, name)} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(results: Mapping[str, Any]) -> str:
    """Markdown: mean loss by number of examples."""
    lines = [
        f"| mean loss with examples of each source | {' | '.join(map(str, COUNTS))} |",
        "|---|" + "---:|" * len(COUNTS),
    ]
    for name in SEVERAL:
        cells = []
        for count in COUNTS:
            found = [results[key_of(name, seed, count)] for seed in SEEDS]
            cells.append(cell([mean_of(one, "loss") for one in found]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(scores: Mapping[str, float], kind: str) -> float:
    return statistics.mean(scores[f"{kind} {name}"] for name in EXPERTS)


def cell(values: list[float], digits: int = 3) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def write_page(results: Mapping[str, Any]) -> None:
    """The generated parts of statistics.md, between their markers."""
    page = DOCS / "statistics.md"
    text = page.read_text(encoding="utf-8")
    for name, content in (("results", table(results)), ("counts", counts(results))):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "examples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="tables from statistics.json")
    options = parser.parse_args()
    numbers = DOCS / "statistics.json"
    if options.report:
        write_page(json.loads(numbers.read_text(encoding="utf-8")))
        return
    os.environ.setdefault("MERGE_CLI_CACHE", str(options.work / "cache"))
    import torch

    torch.set_num_threads(options.threads)
    experiment = Experiment(options.work)
    run_all(experiment)
    numbers.write_text(json.dumps(experiment.results, indent=1) + "\n", encoding="utf-8")
    write_page(experiment.results)


if __name__ == "__main__":
    main()
