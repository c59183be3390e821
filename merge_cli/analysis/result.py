"""The result of an analysis, as data for tables, JSON and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from merge_cli.analysis.differences import KeyDifference, TokenizerDifference
from merge_cli.analysis.measures import GroupSums, Measures
from merge_cli.analysis.spectra import Spectrum
from merge_cli.recipe.schema import Recipe

SCHEMA = 1


@dataclass(frozen=True)
class Finding:
    """What the numbers suggest about one or more models.

    Attributes:
        kind: for programs: `identical`, `equals_base`, `unrelated`, `far`, `rl_like`,
            `sparse`, `low_rank`, `louder`, `concentrated`, `untouched`,
            `mismatch`, `vocabulary`, `added_tokens`, `routers`.
        models: the models that it is about.
        text: a sentence with the measured values.
        threshold: the condition.
        warns: whether it is a reason not to merge.
    """

    kind: str
    models: tuple[str, ...]
    text: str
    threshold: str
    warns: bool = False


@dataclass(frozen=True)
class Suggestion:
    """A method that is worth trying, the measured reason, and the source of the rule."""

    method: str
    reason: str
    source: str


@dataclass(frozen=True)
class Advice:
    """What to try first.

    Attributes:
        summary: one sentence.
        recipe: of the first suggestion; None where these models should not, or cannot, be merged.
        comments: one line for each choice in the recipe.
    """

    summary: str
    suggestions: tuple[Suggestion, ...] = ()
    recipe: Recipe | None = None
    comments: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFiles:
    """A model's files in numbers: the reference (base or first model) comes first."""

    model: str
    reference: str
    revision: str | None
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Analysis:
    """The result of `merge_cli.analyze`.

    Attributes:
        base: None without a base; files are then compared with the first model.
        models: the sources, in the order of every row and matrix.
        files: of every model, the base first.
        compared, tensors: how many of the tensors could be compared.
        problems: why a merge of these models would be refused; empty where it would run.
        total: over all compared tensors; None if there are none.
        inner: over the layers, without embeddings and head; None without layers.
        layers, kinds, cells: by layer, kind of module, and both.
        groups: what `each` is made from.
        spectra: sampled matrices' ranks; empty without a base.
        sparsity_where_changed: for each source, the share of unchanged elements of those tensors
            that it changed at all; None without a base.
        seconds, bytes_read, peak_memory: the cost.
    """

    base: str | None
    models: tuple[str, ...]
    files: tuple[ModelFiles, ...]
    compared: int
    tensors: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    total: Measures | None
    inner: Measures | None
    layers: tuple[Measures, ...]
    kinds: tuple[Measures, ...]
    cells: tuple[Measures, ...]
    groups: GroupSums
    spectra: tuple[Spectrum, ...]
    sparsity_where_changed: tuple[float | None, ...] | None
    config: tuple[KeyDifference, ...]
    tokenizers: tuple[TokenizerDifference, ...]
    verdicts: tuple[Finding, ...]
    advice: Advice
    seed: int
    device: str
    threads: int
    seconds: float
    bytes_read: int
    peak_memory: int

    @cached_property
    def each(self) -> tuple[Measures, ...]:
        """By tensor; made when it is first asked for, because there may be tens of thousands."""
        return self.groups.each()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-ready data (docs/analyze.md)."""
        from importlib.metadata import version

        names = ["each" if field.name == "groups" else field.name for field in fields(self)]
        content = {name: _plain(getattr(self, name)) for name in names}
        advice = content["advice"]
        advice.pop("recipe")
        return {"schema": SCHEMA, "merge_cli": version("merge-cli"), **content}


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        return None  # `--write-recipe` writes it
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
