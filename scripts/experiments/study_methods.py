"""The study's methods: a recipe, or a few that validation rows choose from, and what they cost.

CPU seconds are those of `merge-cli run` with one thread, the interpreter's start included. Where
settings are chosen, all merges of the grid and measuring them on validation rows are included.
Trainings in plain PyTorch run in the study's process, after the start of the interpreter.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from family import BASE
from study_families import Family, mean_loss

Recipe = dict[str, Any]
Run = Callable[["Context"], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """A merge, and what it took.

    Attributes:
        folder: the model.
        tokens: that models have read to make it; measuring it on test rows does not count.
        chosen: the settings that validation rows have chosen, in words.
        details: for study.json alone.
    """

    folder: Path
    cpu: float = 0.0
    tokens: int = 0
    chosen: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where a method runs.

    Attributes:
        rates: learning rates of the trainings in plain PyTorch, by kind.
    """

    family: Family
    seed: int
    work: Path
    rates: Mapping[str, float]

    def merge(self, recipe: Recipe, name: str) -> tuple[Path, float, dict[str, Any]]:
        """The merge's folder, its CPU seconds, its report. Nothing is taken from a cache."""
        self.work.mkdir(parents=True, exist_ok=True)
        file, out = self.work / f"{name}.yaml", self.work / name
        document = {"dtype": "float32", "seed": self.seed, **recipe}
        file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "merge_cli", "run", file, out, "--overwrite", "--fresh"]
        options = ["--quiet", "--threads", "1", "--device", "cpu"]
        with tempfile.TemporaryDirectory(dir=self.work) as cache:
            before = _children()
            subprocess.run(
                [*map(str, command), *options],
                check=True,
                env={**os.environ, "MERGE_CLI_CACHE": cache, "OMP_NUM_THREADS": "1"},
            )
            cpu = _children() - before
        return out, cpu, json.loads((out / "merge_report.json").read_text(encoding="utf-8"))

    def models(self, data: Callable[[Any], Any] | None = None) -> list[Recipe]:
        """The recipe's models, with the data that a method looks at."""
        plain = [{"model": str(source.folder)} for source in self.family.sources]
        if data is None:
            return plain
        return [
            {**one, "data": data(source)}
            for one, source in zip(plain, self.family.sources, strict=True)
        ]


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def existing(folder: Callable[[Family], Path]) -> Run:
    """A model that is there."""
    return lambda context: Outcome(folder(context.family))


def soup(context: Context) -> Outcome:
    folder, cpu, _ = context.merge({"merge_method": "soup", "models": context.models()}, "soup")
    return Outcome(folder, cpu)


def grid(method: str, settings: Sequence[Mapping[str, float]]) -> Run:
    """A merge of task vectors at the setting that is best on validation rows."""

    def run(context: Context) -> Outcome:
        cpu, tokens, tried = 0.0, 0, []
        for number, parameters in enumerate(settings):
            recipe: Recipe = {
                "merge_method": method,
                "base_model": str(BASE),
                "models": context.models(),
                "parameters": dict(parameters),
            }
            folder, seconds, _ = context.merge(recipe, f"{method}-{number}")
            began = time.process_time()
            losses, cost = context.family.val_losses(folder, context.seed)
            cpu += seconds + time.process_time() - began
            tokens += cost.tokens
            tried.append((mean_loss(losses), folder, words(parameters)))
        best = choose(tried)
        details = {"validation": {text: loss for loss, _, text in tried}}
        return Outcome(best[1], cpu, tokens, best[2], details)

    return run


def choose(tried: Sequence[tuple[float, Path, str]]) -> tuple[float, Path, str]:
    """The lowest loss on validation rows: all that the choice may depend on."""
    return min(tried, key=lambda item: item[0])


def words(parameters: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('lambda', 'λ')} {x:g}" for name, x in parameters.items())


def statistics(method: str) -> Run:
    """Fisher or RegMean."""

    def run(context: Context) -> Outcome:
        recipe = {
            "merge_method": method,
            "models": context.models(lambda source: str(source.train)),
            "statistics": _statistics(context),
        }
        folder, cpu, report = context.merge(recipe, method)
        return Outcome(folder, cpu, report["gathered"]["cost"]["tokens"])

    return run


def _statistics(context: Context) -> Recipe:
    return {"examples": context.family.sizes.examples, "max_length": 128}


def dam(name: str, budget: str = "", **training: Any) -> Run:
    """Learned coefficients, with as many tokens as a budget has."""

    def run(context: Context) -> Outcome:
        options = {**training, "tokens": context.family.sizes.budget(budget)}
        recipe = {
            "merge_method": "dam",
            "base_model": str(BASE),
            "models": context.models(
                lambda source: {"files": str(source.train), "held_out": str(source.val)}
            ),
            "training": options,
        }
        folder, cpu, report = context.merge(recipe, name)
        details = {k: report["training"].get(k) for k in ("start", "best_step", "steps", "verdict")}
        return Outcome(folder, cpu, report["training"]["cost"]["tokens"], "", details)

    return run


def automatic(name: str, methods: Sequence[str] = ()) -> Run:
    """merge_method: auto. It divides train and validation rows by itself."""

    def run(context: Context) -> Outcome:
        recipe = {
            "merge_method": "auto",
            "base_model": str(BASE),
            "models": context.models(lambda source: [str(source.train), str(source.val)]),
            **dict(context.family.sizes.automatic),
        }
        if methods:
            recipe["methods"] = list(methods)
        else:
            recipe["statistics"] = _statistics(context)
        folder, cpu, report = context.merge(recipe, name)
        found = report["auto"]
        kept = ("step", "loss", "final_loss", "kept", "cpu_seconds", "tokens", "note")
        path = [{key: line[key] for key in kept if key in line} for line in found["path"]]
        cost = found["cost"]
        tokens = cost["tokens"] + cost["final_tokens"] + cost["test_tokens"]
        return Outcome(folder, cpu, tokens, found["best"], {"path": path})

    return run


def trained(kind: str, budget: str = "") -> Run:
    """The soup, trained on as many tokens as a budget has, at the rate that the zoo chose."""

    def run(context: Context) -> Outcome:
        from study_training import train

        start = soup(context)
        out = context.work / kind.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        tokens, rate = context.family.sizes.budget(budget), context.rates[kind]
        found = train(kind, context.family, start.folder, tokens, rate, context.seed, out)
        details = {"validation": found.losses, "rate": rate}
        return Outcome(out, start.cpu + found.cpu, found.tokens, "", details)

    return run


TASK_ARITHMETIC = [{"lambda": x} for x in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
TIES = [{"density": d, "lambda": x} for d in (0.2, 0.5) for x in (0.2, 0.5)]
DARE = [{"density": 0.5, "lambda": x} for x in (0.1, 0.2, 0.4)]
