"""RegMean and Fisher merging beside soup, task arithmetic and DAM, on the model family in zoo/.

    python scripts/experiments/examples.py              # about 20 minutes on one core
    python scripts/experiments/examples.py --report     # tables again

The setting is that of dam.py: the japanese, math and code experts, the same test rows, loss in nats
per token and KL(expert || model) on each expert's own text. Statistics see the train split. Nothing
is chosen but task arithmetic's lambda, on the validation split: all settings of the two methods
are shown.

Writes docs/experiments/statistics.json and the tables in statistics.md. What is finished is kept in
--work and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dam
from dam import DOCS, EXPERTS, GRIDS, LEARNED, ROOT, ZOO, Experiment

SEEDS = (0, 1, 2)
LENGTH = 128
TASK_ARITHMETIC, DAM = "task arithmetic", "DAM (task vectors)"
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
    recipe = dam.static_recipe({"method": "soup"})
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
    for setting in GRIDS[TASK_ARITHMETIC]:

        def on_val(setting: Any = setting) -> dict[str, Any]:
            out, _ = experiment.merge(dam.label_of(setting, "-"), dam.static_recipe(setting))
            return {"setting": setting, **experiment.score(out, "val", loss=False)}

        experiment.once(f"val {TASK_ARITHMETIC}: {dam.label_of(setting)}", on_val)
    best = dam.best_setting(experiment.results, TASK_ARITHMETIC)
    fixed = {
        "uniform soup": dam.static_recipe({"method": "soup"}),
        SOUP_WITH_BASE: soup_with_base(),
        TASK_ARITHMETIC: dam.static_recipe(best),
        DAM: dam.learned_recipe(LEARNED[DAM], 0),
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
    best = dam.best_setting(results, TASK_ARITHMETIC)["lambda"]
    shown = {TASK_ARITHMETIC: f"task arithmetic, lambda {best:g}"}
    plain = ("base", *EXPERTS, "uniform soup", SOUP_WITH_BASE, TASK_ARITHMETIC, DAM)
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
