"""What models are, before any weight is read: headers, configs, tokenizers, cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merge_cli.analysis.differences import TokenizerDifference, stored_dtypes, tokenizer_difference
from merge_cli.analysis.model_set import ModelSet, open_model_set, recipe_of
from merge_cli.checkpoint.dtypes import DTYPES, MERGEABLE
from merge_cli.errors import MismatchError
from merge_cli.hub.models import is_cached
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
    """Models side by side, from their small files.

    Attributes:
        tokenizers: how each model's differs from the base's (or the first model's), in order.
        dtype: what all of them are stored in, in a recipe's words; None where they differ.
        parent: the repository that the models' cards name as what they were made from; None where
            they name none or several.
    """

    subject: ModelSet
    tokenizers: tuple[TokenizerDifference, ...]
    dtype: str | None
    parent: str | None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model, the base first."""
        return self.subject.sources

    @property
    def recipe(self) -> Recipe:
        """The models as a recipe names them, in the dtype that they have."""
        return self.dressed(self.subject.plan.recipe)

    @property
    def unlike(self) -> bool:
        """Whether a token number may mean different tokens in different models."""
        return any(
            tokenizer.tokens_differ
            for tokenizer in self.tokenizers
            if tokenizer.size and tokenizer.reference_size
        )

    def dressed(self, recipe: Recipe) -> Recipe:
        """A recipe of these models with the dtype and the vocabulary that they need."""
        tokenizer = TokenizerSpec(UNION) if self.unlike else None
        return replace(recipe, dtype=self.dtype, tokenizer=tokenizer)

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(ref.nbytes for source in self.sources for ref in source.tensors.values())

    @property
    def is_here(self) -> bool:
        """Whether all weights are on this machine."""
        return all(
            is_cached(repository, name)
            for source in self.sources
            for repository, names in (
                (source.hub, tuple(source.header_bytes)),
                (source.adapter.hub if source.adapter else None, (WEIGHTS,)),
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
        """What should be known about these models, one line each."""
        subject = self.subject
        lines = [self.summary, *subject.plan.notes]
        for name, item in zip(self._compared, self.tokenizers, strict=True):
            if item.tokens_differ:
                lines.append(
                    f"{name}: another vocabulary than {self._first} ({item.missing:,} tokens "
                    f"missing, {item.added:,} added, {item.renumbered:,} with another number)"
                )
            elif item.rules or item.special:
                lines.append(f"{name}: cuts or marks text in another way than {self._first}")
        lines += self._kinship()
        return lines

    def _kinship(self) -> list[str]:
        if self.parent is None:
            return []
        labels = {_repository(source): source.label for source in self.sources}
        base = _repository(self.sources[0]) if self.subject.base is not None else None
        if base is None and self.parent in labels:
            own = labels[self.parent]
            return [f"by their cards the others were made from {own}: give it as the base"]
        if base is None:
            return [f"by their cards they were made from {self.parent}: give it as the base"]
        if self.parent != base and "/" in base:
            return [f"by their cards they were made from {self.parent}, not from {base}"]
        return []

    @property
    def _first(self) -> str:
        return self.subject.base or self.subject.models[0]

    @property
    def _compared(self) -> Sequence[str]:
        return self.subject.models if self.subject.base is not None else self.subject.models[1:]


def inspect_model(base: str | None, models: Sequence[str]) -> ModelInspection:
    """Open models as a command line names them.

    Raises:
        SourceError, HubError: a model that cannot be opened.
        MismatchError: several of these, or models that do not fit one another: every reason.
        UsageError: fewer than two models.
    """
    subject = open_model_set(recipe_of(base, models))
    sources = subject.sources
    tokenizers = [read_tokenizer(source) for source in sources]
    names = [source.label for source in sources]
    differences = tuple(
        tokenizer_difference(name, tokenizers[0], own)
        for name, own in zip(names[1:], tokenizers[1:], strict=True)
    )
    parents = {parent for source in sources if (parent := _parent(source)) is not None}
    if len(parents) > 1 and subject.base is not None:  # the base's own parent is another story
        parents = {p for source in sources[1:] if (p := _parent(source)) is not None}
    parent = parents.pop() if len(parents) == 1 else None
    look = ModelInspection(subject, differences, _dtype(sources), parent)
    if subject.problems and not look.unlike:  # else the plan knows better, with rows by token
        raise MismatchError(subject.problems, "these models cannot be merged with one another")
    return look


def _dtype(sources: Sequence[Source]) -> str | None:
    found = {dtype for stored in stored_dtypes(sources) for dtype in stored if dtype in MERGEABLE}
    return DTYPES[found.pop()][1] if len(found) == 1 else None


def _architecture(source: Source) -> str:
    names = source.config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return str(source.config.get("model_type") or "an unknown architecture")


def _repository(source: Source) -> str:
    return source.hub.repo_id if source.hub is not None else source.label


def _parent(source: Source) -> str | None:
    """The one model that a card, or else a config, names as what this one was made from."""
    named = source_cards(source)[0].get("base_model")
    listed = named if isinstance(named, list) else [named or source.config.get("_name_or_path")]
    found = {item for item in listed if isinstance(item, str) and "/" in item and hub_id(item)}
    parent = found.pop() if len(found) == 1 else None
    return parent if parent != _repository(source) else None
