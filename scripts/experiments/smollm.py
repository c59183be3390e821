"""Merges of a real model's LoRA experts: arithmetic, German and Python on SmolLM2-135M-Instruct.

    python scripts/zoo/smollm.py --only base         # the base, once
    python scripts/experiments/smollm.py             # about 25 minutes on one idle core
    python scripts/experiments/smollm.py --report    # the tables again

The adapters of zoo/smollm are merged into their base first: methods that run models want models.
Every merge is a `merge-cli run` in its own process, which is what CPU seconds are counted of. No
setting is chosen on anything: all that were tried are shown. zoo/smollm/eval.yaml says what is
measured. Writes docs/experiments/smollm.json, and the tables in smollm.md. What is finished is kept
in --work and not done again; `--only NAME` makes one model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import merge_cli
from merge_cli.evaluation.result import Better, Metric
from merge_cli.evaluation.summary import difference, interval, resampled

ROOT = Path(__file__).resolve().parent.parent.parent
FAMILY = ROOT / "zoo" / "smollm"
BASE = FAMILY / "SmolLM2-135M-Instruct"
DOCS = ROOT / "docs" / "experiments"
EXPERTS = ("arithmetic", "german", "python")
BASE_NAME, SOUP = "base", "uniform soup"
_EXAMPLES = {"examples": 32, "max_length": 64}
# Name -> recipe without models; `data`: each model is given its training rows.
METHODS: dict[str, dict[str, Any]] = {
    SOUP: {"merge_method": "soup"},
    "task arithmetic, λ = 0.5": {
        "merge_method": "task_arithmetic", "parameters": {"lambda": 0.5},
    },
    "task arithmetic, λ = 1": {"merge_method": "task_arithmetic", "parameters": {"lambda": 1.0}},
    "TIES, density 0.5, λ = 1": {
        "merge_method": "ties", "parameters": {"density": 0.5, "lambda": 1.0},
    },
    "Fisher": {"merge_method": "fisher", "statistics": _EXAMPLES, "data": True},
    "RegMean": {"merge_method": "regmean", "statistics": _EXAMPLES, "data": True},
    "DAM": {
        "merge_method": "dam", "data": True, "statistics": _EXAMPLES,
        "training": {"tokens": 8192, "max_length": 128, "held_out_tokens": 512},
    },
    "auto": {
        "merge_method": "auto", "data": True, "statistics": _EXAMPLES,
        "training": {"tokens": 8192, "max_length": 128},
    },
}  # fmt: skip
_NO_BASE = ("soup", "fisher", "regmean")


def recipe_of(about: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """A method's recipe over the three experts."""
    recipe = {key: value for key, value in about.items() if key != "data"}
    models = [{"model": str(work / "models" / name)} for name in EXPERTS]
    if about.get("data"):
        for model, name in zip(models, EXPERTS, strict=True):
            model["data"] = str(FAMILY / "data" / f"{name}.train.jsonl")
    if recipe["merge_method"] not in _NO_BASE:
        recipe["base_model"] = str(BASE)
    return {**recipe, "models": models, "dtype": "bfloat16", "seed": 0}


def expert_recipe(name: str) -> dict[str, Any]:
    """The base with one adapter."""
    source = f"{BASE}+{FAMILY / name}"
    return {"merge_method": "passthrough", "models": [{"model": source}], "dtype": "bfloat16"}


def merge(name: str, recipe: Mapping[str, Any], work: Path) -> tuple[Path, float]:
    """Runs a recipe in its own process; returns the model's folder and the CPU seconds."""
    file, out = work / f"{name}.yaml", work / "models" / name
    file.write_text(yaml.safe_dump(dict(recipe), allow_unicode=True), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "merge_cli", "run", file, out, "--overwrite", "--quiet"]
    subprocess.run([*map(str, command), "--threads", "1"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return out, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(name: str, work: Path) -> dict[str, Any]:
    """One model on every task, made first if need be; kept example by example."""
    kept = work / "measured" / f"{name}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    seconds = 0.0
    if name == BASE_NAME:
        folder = BASE
    elif name in EXPERTS:
        folder, seconds = merge(name, expert_recipe(name), work)
    else:
        for expert in EXPERTS:
            if not (work / "models" / expert).exists():
                merge(expert, expert_recipe(expert), work)
        folder, seconds = merge(name, recipe_of(METHODS[name], work), work)
    result = merge_cli.evaluate(folder, FAMILY / "eval.yaml")
    found = {
        "cpu_seconds": round(seconds, 1),
        "tasks": {
            task: {"parts": list(one.primary.parts), "weights": list(one.primary.weights)}
            for task, one in result.tasks.items()
        },
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if name in METHODS:
        shutil.rmtree(folder)  # a quarter of a gigabyte each
    return found


def metric(task: str, found: Mapping[str, Any]) -> Metric:
    one = found["tasks"][task]
    better: Better = "higher" if task == "arithmetic" else "lower"
    return Metric(task, "", better, one["parts"], one["weights"])


def summarised(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values with their intervals, and paired differences from base and soup."""
    models: dict[str, Any] = {}
    for name, found in measured.items():
        tasks: dict[str, Any] = {}
        for task in found["tasks"]:
            own = metric(task, found)
            bounds = interval(resampled(own, task))
            tasks[task] = {"value": _short(own.value), "interval": _pair(bounds)}
            for other in (BASE_NAME, SOUP):
                reference = metric(task, measured[other])
                paired = difference(own, reference, task)
                assert paired is not None, "a task of one example has no interval"
                tasks[task][f"minus {other}"] = {
                    "value": _short(own.value - reference.value), "interval": _pair(paired),
                }  # fmt: skip
        models[name] = {"cpu_seconds": found["cpu_seconds"], "tasks": tasks}
    return {"models": models, "examples": _examples(measured[BASE_NAME])}


def _examples(found: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    return {
        task: {"examples": len(one["parts"]), "weight": round(math.fsum(one["weights"]))}
        for task, one in found["tasks"].items()
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _pair(bounds: Any) -> list[float]:
    return [_short(bounds.low), _short(bounds.high)]


def table(results: Mapping[str, Any]) -> str:
    """One row for each model: exact answers, losses, differences from the soup."""
    lines = [
        "| model | exact answers | German, nats per token | Python, nats per token "
        "| answers: more than base | answers: more than soup | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, model in results["models"].items():
        tasks = model["tasks"]
        answers = tasks["arithmetic"]
        cells = [f"{answers['value']:.1%}"]
        cells += [f"{tasks[task]['value']:.3f}" for task in ("german", "python")]
        for other in (BASE_NAME, SOUP):
            gain = answers[f"minus {other}"]
            same = name == other
            cells.append("" if same else _gain(gain, 100, 1, " points"))
        cells.append(f"{model['cpu_seconds']:.0f}" if name in METHODS else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses(results: Mapping[str, Any]) -> str:
    """Paired differences of the two losses; below 0 is better."""
    lines = [
        "| model | German: minus base | German: minus soup | Python: minus base "
        "| Python: minus soup |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, model in results["models"].items():
        cells = [
            "" if name == other else _gain(model["tasks"][task][f"minus {other}"], 1, 3, "")
            for task in ("german", "python")
            for other in (BASE_NAME, SOUP)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gain(gain: Mapping[str, Any], scale: int, digits: int, unit: str) -> str:
    low, high = (scale * bound for bound in gain["interval"])
    shown = f"{scale * gain['value']:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f})"
    return shown.replace("-", "−")


def publish(results: Mapping[str, Any]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (DOCS / "smollm.json").write_text(text + "\n", encoding="utf-8")
    page = DOCS / "smollm.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- results -->")
    _, _, tail = rest.partition("<!-- end of results -->")
    shown = f"{table(results)}\n\n{losses(results)}"
    page.write_text(
        f"{head}<!-- results -->\n{shown}\n<!-- end of results -->{tail}", encoding="utf-8"
    )
    print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "smollm")
    parser.add_argument("--only", nargs="+", choices=[BASE_NAME, *EXPERTS, *METHODS])
    parser.add_argument("--report", action="store_true", help="write the tables again")
    options = parser.parse_args()
    if options.report:
        publish(json.loads((DOCS / "smollm.json").read_text(encoding="utf-8")))
        return
    if not (BASE / "model.safetensors").exists():
        raise SystemExit("Make the base first: python scripts/zoo/smollm.py --only base")
    os.environ.setdefault("MERGE_CLI_CACHE", str(options.work / "cache"))
    (options.work / "models").mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(1)
    everything = (BASE_NAME, *EXPERTS, *METHODS)
    for name in options.only or everything:
        measure(name, options.work)
        print(f"{name}: measured", file=sys.stderr, flush=True)
    done = options.work / "measured"
    names = [name for name in everything if (done / f"{name}.json").exists()]
    if {BASE_NAME, SOUP} <= set(names):
        publish(summarised({name: measure(name, options.work) for name in names}))


if __name__ == "__main__":
    main()
