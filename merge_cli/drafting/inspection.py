"""Inspecting models for `init` without reading weights: headers, configs, tokenizers, cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merge_cli.analysis.differences import TokenizerDifference, stored_dtypes, tokenizer_difference
from merge_cli.analysis.model_set import ModelSet, open_model_set, recipe_of
from merge_cli.checkpoint.dtypes import DTYPES, MERGEABLE
from merge_cli.errors import MismatchError
from merge_cli.lora.adapter import WEIGHTS
from merge_cli.recipe.reference import hub_id
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import UNION, TokenizerSpec
from merge_cli.report.card import source_cards
from merge_cli.sources.source import Source
from merge_cli.system.machine import show_size
from merge_cli.tokenizer.files import read_tokenizer


@dataclass(frozen=True)
class ModelInspection:
    """What the small files of several models say.

    Attributes:
        tokenizers: how each model's differs from the base's (or the first model's), in order.
        dtype: the stored dtype of all models, as recipes write it; None where they differ.
        parent: the repository that the models' cards name as their base model; None where they
            name none or several.
    """

    model_set: ModelSet
    tokenizers: tuple[TokenizerDifference, ...]
    dtype: str | None
    parent: str | None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model, the base first."""
        return self.model_set.sources

    @property
    def recipe(self) -> Recipe:
        """A recipe of the models, with the dtype and the vocabulary that they need."""
        return self.with_dtype_and_tokenizer(self.model_set.plan.recipe)

    @property
    def vocabularies_differ(self) -> bool:
        """Whether a token number may mean different tokens in different models."""
        return any(
            tokenizer.tokens_differ
            for tokenizer in self.tokenizers
            if tokenizer.size and tokenizer.reference_size
        )

    def with_dtype_and_tokenizer(self, recipe: Recipe) -> Recipe:
        """A recipe of these models with the dtype and the vocabulary that they need."""
        tokenizer = TokenizerSpec(UNION) if self.vocabularies_differ else None
        return replace(recipe, dtype=self.dtype, tokenizer=tokenizer)

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(ref.nbytes for source in self.sources for ref in source.tensors.values())

    @property
    def is_cached_locally(self) -> bool:
        """Whether all weights are on this machine."""
        return all(
            repository.is_cached(name)
            for source in self.sources
            for repository, names in (
                (source.repository, tuple(source.header_bytes)),
                (source.adapter.repository if source.adapter else None, (WEIGHTS,)),
            )
            if repository is not None
            for name in names
        )

    @property
    def summary(self) -> str:
        """One line on what the models are."""
        kinds = Counter(_architecture(source) for source in self.sources)
        kind = " and ".join(kinds)
        counts = {sum(ref.size for ref in s.tensors.values()) for s in self.sources}
        low, high = f"{min(counts):,}", f"{max(counts):,}"
        size = low if low == high else f"{low} to {high}"
        stored = self.dtype or "several dtypes"
        total = show_size(self.size)
        return f"{len(self.sources)} models, {kind}, {size} parameters each, {stored}, {total}"

    def notes(self) -> list[str]:
        """Notes for the user about these models, one line each."""
        model_set = self.model_set
        lines = [self.summary, *model_set.plan.notes]
        for name, tokenizer in zip(self._compared, self.tokenizers, strict=True):
            if tokenizer.tokens_differ:
                lines.append(
                    f"{name}: another vocabulary than {self._first} "
                    f"({tokenizer.missing:,} tokens missing, {tokenizer.added:,} added, "
                    f"{tokenizer.renumbered:,} with another number)"
                )
            elif tokenizer.rules or tokenizer.special:
                lines.append(f"{name}: splits or marks text differently from {self._first}")
        lines += self._kinship()
        return lines

    def _kinship(self) -> list[str]:
        if self.parent is None:
            return []
        labels = {_repository(source): source.label for source in self.sources}
        base = _repository(self.sources[0]) if self.model_set.base is not None else None
        if base is None and self.parent in labels:
            base_label = labels[self.parent]
            return [f"by their cards the others were made from {base_label}: give it as the base"]
        if base is None:
            return [f"by their cards they were made from {self.parent}: give it as the base"]
        if self.parent != base and "/" in base:
            return [f"by their cards they were made from {self.parent}, not from {base}"]
        return []

    @property
    def _first(self) -> str:
        return self.model_set.base or self.model_set.models[0]

    @property
    def _compared(self) -> Sequence[str]:
        return (
            self.model_set.models if self.model_set.base is not None else self.model_set.models[1:]
        )


def inspect_model(base: str | None, models: Sequence[str]) -> ModelInspection:
    """Inspect models: folders or Hub ids.

    Raises:
        SourceError, HubError: a model that cannot be opened.
        MismatchError: several of these, or models that do not fit one another: every reason.
        UsageError: fewer than two models.
    """
    model_set = open_model_set(recipe_of(base, models))
    sources = model_set.sources
    tokenizers = [read_tokenizer(source) for source in sources]
    names = [source.label for source in sources]
    differences = tuple(
        tokenizer_difference(name, tokenizers[0], tokenizer)
        for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True)
    )
    parents = {parent for source in sources if (parent := _parent(source)) is not None}
    if len(parents) > 1 and model_set.base is not None:  # the base's own parent does not count
        parents = {p for source in sources[1:] if (p := _parent(source)) is not None}
    parent = parents.pop() if len(parents) == 1 else None
    inspection = ModelInspection(model_set, differences, _dtype(sources), parent)
    if (
        model_set.problems and not inspection.vocabularies_differ
    ):  # else rows are aligned by token, and the plan checks them
        raise MismatchError(model_set.problems, "these models cannot be merged with one another")
    return inspection


def _dtype(sources: Sequence[Source]) -> str | None:
    dtypes = {dtype for stored in stored_dtypes(sources) for dtype in stored if dtype in MERGEABLE}
    return DTYPES[dtypes.pop()][1] if len(dtypes) == 1 else None


def _architecture(source: Source) -> str:
    names = source.config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return str(source.config.get("model_type") or "an unknown architecture")


def _repository(source: Source) -> str:
    return source.hub.repo_id if source.hub is not None else source.label


def _parent(source: Source) -> str | None:
    """The base model that a card, or else a config, names; None for none or several."""
    base_model = source_cards(source)[0].get("base_model")
    listed = (
        base_model
        if isinstance(base_model, list)
        else [base_model or source.config.get("_name_or_path")]
    )
    parents = {name for name in listed if isinstance(name, str) and "/" in name and hub_id(name)}
    parent = parents.pop() if len(parents) == 1 else None
    return parent if parent != _repository(source) else None
