"""Sources with one vocabulary: what aligning them brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge_cli.checkpoint.tensors import TensorMap
from merge_cli.errors import RecipeError
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class AlignedVocabulary:
    """Sources with one vocabulary.

    Attributes:
        views: for each source, its tensors by name.
        tokenizer_index: of the source whose tokenizer files the output has; the number of sources
            for `guest`.
        files: tokenizer files that differ from that source's.
        rows: of the output's embeddings; None keeps the number in the config.
        ids: token's number in the source of the config -> in the output; None without changes.
        notes: what was done.
        changed: whether any tensor was rearranged.
        guest: a model that is not merged and only gives the tokenizer files.
    """

    views: tuple[TensorMap, ...]
    tokenizer_index: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    rows: int | None = None
    ids: Mapping[int, int] | None = None
    notes: tuple[str, ...] = ()
    changed: bool = False
    guest: Source | None = None

    def refuse_rearranged(self, recipe: Recipe, work: str) -> None:
        """Refuse rearranged rows for work that runs the sources as they are.

        Raises:
            RecipeError: rows were rearranged.
        """
        if self.changed or self.files or self.guest is not None:
            message = f"{work} runs the models, which must share a vocabulary."
            hint = "Bring them to one vocabulary first: merge each alone, with this section."
            key = "tokenizer" if "tokenizer" in recipe.positions else "tokenizer_source"
            raise RecipeError([recipe.problem(key, message, hint)])
