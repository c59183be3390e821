"""The study's two families: models, and the text that they learn from, choose by and are judged by.

zoo        japanese, maths and code: three scripts. Some of merge-cli's defaults were chosen here.
registers  english, german and maths: shared words. Nothing was chosen here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from family import DATA, ROOT, WORK, Expert, model

import merge_cli
from merge_cli.evaluation.result import Cost, Metric
from merge_cli.evaluation.tasks.loss import LossTask

FAMILIES = {
    "zoo": ("japanese", "math", "code"),
    "registers": ("english", "german", "math"),
}
_LENGTH = 512  # tokens of context that a model is measured with
_EXPERT_SEED = 5  # of the registers' experts; those of the zoo are committed
_PROBLEMS = 1700  # maths problems to learn from, as many as the zoo has


@dataclass(frozen=True)
class Sizes:
    """How much is looked at; `QUICK` only shows that everything runs.

    Attributes:
        val, test: rows of text, and of maths, to choose by and to judge by.
        examples: of each source that Fisher and RegMean look at.
        budgets: tokens of all sources together that a training learns from, by name; the empty
            name is merge-cli's default, with which learning rates are chosen, too.
        automatic: keys that the recipes of `merge_method: auto` get.
    """

    val: tuple[int, int] = (7, 40)
    test: tuple[int, int] = (20, 80)
    examples: int = 96
    budgets: tuple[tuple[str, int], ...] = (
        ("12k", 12_288),
        ("", 32_768),
        ("50k", 50_000),
        ("200k", 200_000),
    )
    automatic: tuple[tuple[str, Any], ...] = ()

    def budget(self, name: str) -> int:
        """Tokens that a training learns from."""
        return dict(self.budgets)[name]


FULL = Sizes()
QUICK = Sizes(
    (2, 4),
    (2, 4),
    2,
    (("12k", 600), ("", 900), ("50k", 1000), ("200k", 1200)),
    (("budget", {"tokens": 25_000}),),
)


@dataclass(frozen=True)
class Source:
    """One domain's expert and its text."""

    domain: str
    folder: Path
    train: Path
    val: Path
    test: Path


@dataclass(frozen=True)
class Family:
    """Experts of one base.

    Attributes:
        name: a key of `FAMILIES`.
        sources: in the order of every recipe.
        sizes: how much is looked at.
    """

    name: str
    sources: tuple[Source, ...]
    sizes: Sizes

    def val_losses(self, folder: Path, seed: int) -> tuple[dict[str, Metric], Cost]:
        """On the validation rows that a seed draws."""
        return _losses(folder, self._tasks("val"), seed)

    def test_losses(self, folder: Path) -> dict[str, Metric]:
        """On the test rows, which are the same for every seed and choose nothing."""
        return _losses(folder, self._tasks("test"), 0)[0]

    def _tasks(self, split: str) -> list[LossTask]:
        text, maths = getattr(self.sizes, split)
        return [
            LossTask(
                name=source.domain,
                data=getattr(source, split),
                limit=maths if source.domain == "math" else text,
            )
            for source in self.sources
        ]


def family_of(name: str, sizes: Sizes = FULL) -> Family:
    """A family; experts that are missing are trained."""
    sources = []
    for domain in FAMILIES[name]:
        folder, train = ROOT / "zoo" / domain, DATA / f"{domain}.train.jsonl"
        if name == "registers":
            expert = "math-b" if domain == "math" else domain
            folder = model(Expert(expert, _EXPERT_SEED))
            if domain == "math":
                train = _problems()
        val, test = (DATA / f"{domain}.{split}.jsonl" for split in ("val", "test"))
        sources.append(Source(domain, folder, train, val, test))
    return Family(name, tuple(sources), sizes)


def _problems() -> Path:
    """Some of the maths problems that the registers' expert has read."""
    file = WORK / "study" / "math-b.train.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with (WORK / "corpora" / "math-b.train.jsonl").open(encoding="utf-8") as rows:
            file.write_text("".join(itertools.islice(rows, _PROBLEMS)), encoding="utf-8")
    return file


def _losses(folder: Path, tasks: list[LossTask], seed: int) -> tuple[dict[str, Metric], Cost]:
    found = merge_cli.evaluate(
        folder, tasks, device="cpu", cache=False, max_length=_LENGTH, seed=seed
    )
    return {name: task.primary for name, task in found.tasks.items()}, found.cost


def mean_loss(losses: dict[str, Metric]) -> float:
    """Nats per token, the mean over domains."""
    return sum(metric.value for metric in losses.values()) / len(losses)
