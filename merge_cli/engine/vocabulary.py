"""One vocabulary for all sources: which row of which model each token's row is.

    tokenizers ─▶ the output's tokens ─▶ for each model: rows ─▶ computed embeddings and heads

What a model lacks is filled in (`rows`); rows beyond a tokenizer (padding) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.gathered import Gathered, Rows
from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.checkpoint.tokenizer_document import converted_vocabulary
from merge_cli.checkpoint.tokenizer_files import opaque_files, read_vocabulary
from merge_cli.checkpoint.union import join
from merge_cli.engine.heads import EMBEDDINGS, View
from merge_cli.engine.rows import Filling, Key, Words
from merge_cli.engine.token_bounds import check_numbers
from merge_cli.errors import RecipeError, SourceError
from merge_cli.recipe.reference import local_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import BASE, UNION

# What tensors with a row for each token are called, whatever the architecture.
_WORDS = ("embed", "wte", "lm_head", "shared.weight", "output.weight", "decoder.weight",
          "decoder.bias", "predictions.bias", "final_logits_bias", "logits", "head")  # fmt: skip


@dataclass(frozen=True)
class Aligned:
    """Sources with one vocabulary.

    Attributes:
        views: for each source, its tensors.
        donor: index of the source whose tokenizer files the output has.
        files: tokenizer files that differ from the donor's.
        rows: of the output's embeddings; None leaves the config's word.
        ids: token's number in the config donor -> in the output; None where nothing moves.
        notes: what was done.
        changed: whether any tensor was rearranged.
    """

    views: tuple[View, ...]
    donor: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    rows: int | None = None
    ids: Mapping[int, int] | None = None
    notes: tuple[str, ...] = ()
    changed: bool = False

    def need_plain(self, recipe: Recipe, work: str) -> None:
        """For what runs the sources as they are.

        Raises:
            RecipeError: rows were rearranged.
        """
        if self.changed or self.files:
            what = f"{work} runs the models, which must share a vocabulary."
            hint = "Bring them to one vocabulary first: merge each alone, with this section."
            key = "tokenizer" if "tokenizer" in recipe.places else "tokenizer_source"
            raise RecipeError([recipe.problem(key, what, hint)])


def align(
    recipe: Recipe, sources: Sequence[Source], views: Sequence[View], base: int | None, donor: int
) -> Aligned:
    """Bring the sources' embeddings and heads into the order that the recipe asks for.

    Args:
        views: as `heads` has reconciled them.
        donor: whose config the output takes.

    Raises:
        RecipeError: a token or a model that is not there.
        SourceError: a tokenizer that cannot be read, or to which nothing can be added.
    """
    spec = recipe.tokenizer
    if spec is None:
        return Aligned(tuple(views), donor)
    return _Alignment(recipe, sources, views, base, donor).result()


class _Alignment:
    def __init__(
        self, recipe: Recipe, sources: Sequence[Source], views: Sequence[View],
        base: int | None, donor: int,
    ) -> None:  # fmt: skip
        assert recipe.tokenizer is not None
        self._recipe, self._spec = recipe, recipe.tokenizer
        self._sources, self._views = sources, views
        self._base, self._donor = base, donor
        self._notes: list[str] = []
        self._first = base if base is not None else 0
        if self._spec.source != UNION:
            self._named(self._spec.source)
        self._tokens = [_vocabulary(source) for source in sources]
        self._fill_in()
        self._rows = [_height(s, v) for s, v in zip(sources, views, strict=True)]
        for source, tokens, rows in zip(sources, self._tokens, self._rows, strict=True):
            check_numbers(source, tokens, rows)

    def result(self) -> Aligned:
        chosen, vocabulary, files = self._output()
        rows = max([self._rows[chosen], *(number + 1 for number in vocabulary.values())])
        multiple = self._spec.pad_to_multiple_of
        if multiple:
            rows = -(-rows // multiple) * multiple
        keys: list[Key] = list(range(rows))
        for token, number in vocabulary.items():
            keys[number] = token
        words = [Words(*one) for one in zip(
            (source.label for source in self._sources), self._tokens, self._rows, strict=True
        )]  # fmt: skip
        filling = Filling(self._recipe, words, self._base, self._index)
        tables = filling.tables(keys)
        if filling.problems:
            raise RecipeError(filling.problems)
        self._notes += filling.notes
        views, changed = self._gather(tables, rows)
        if changed:
            self._notes.append(
                f"vocabulary: {rows} rows, {len(vocabulary)} tokens; {', '.join(changed)} "
                "rearranged"
            )
        ids = self._ids(vocabulary)
        return Aligned(views, chosen, files, rows, ids, tuple(self._notes), bool(changed))

    def _fill_in(self) -> None:
        """A model without tokenizer files counts its rows as the base does."""
        known = self._tokens[self._first]
        if not known:
            what = "has no tokenizer, so that nobody can tell what its rows mean"
            raise SourceError(what, model=self._sources[self._first].label)
        for i, tokens in enumerate(self._tokens):
            if tokens:
                continue
            source = self._sources[i]
            self._tokens[i] = known
            first = self._sources[self._first].label
            self._notes.append(f"{source.label}: has no tokenizer; taken to have {first}'s")

    def _output(self) -> tuple[int, Mapping[str, int], Mapping[str, bytes]]:
        """Whose files the output has, its tokens, and the files that are its own."""
        spec, extra = self._spec, list(self._spec.tokens)
        if spec.source == UNION:
            others = [
                (self._sources[i], self._tokens[i])
                for i in range(len(self._sources)) if i != self._first
            ]  # fmt: skip
            chosen = self._first
        else:
            others, chosen = [], self._named(spec.source)
        own = self._tokens[chosen]
        union = join(self._sources[chosen], others, own, extra)
        self._notes += union.notes
        return chosen, union.vocabulary, union.files

    def _named(self, word: str) -> int:
        """The source that `base`, or a model's name, means."""
        if word == BASE:
            if self._base is None:
                what = "there is no base_model to take the tokenizer from."
                raise RecipeError([self._recipe.problem(self._spec.key, what)])
            return self._base
        found = self._index(word)
        if found is None:
            what = f"'{word}' is none of the recipe's models."
            hint = "Use `union`, `base` or one of them."
            raise RecipeError([self._recipe.problem(self._spec.key, what, hint)])
        return found

    def _index(self, word: str) -> int | None:
        place = local_folder(word, self._recipe.folder)
        for i, source in enumerate(self._sources):
            own = local_folder(source.label, self._recipe.folder)
            if source.label == word or (place and own and place.resolve() == own.resolve()):
                return i
        return None

    def _gather(self, tables: Sequence[Rows], rows: int) -> tuple[tuple[View, ...], list[str]]:
        """Every source's tensors, those with a row for each token rearranged; their names."""
        import numpy as np

        names = [name for name in self._views[0] if self._has_tokens(name)]
        moved = [
            not (
                rows == self._rows[i] and bool((table.part == i).all())
                and bool((table.row == np.arange(rows)).all())
            )
            for i, table in enumerate(tables)
        ]  # fmt: skip
        views = []
        for view, table, changed in zip(self._views, tables, moved, strict=True):
            new: dict[str, Tensor] = dict(view)
            if changed:
                for name in names:
                    parts = tuple(other[name] for other in self._views)
                    new[name] = Gathered(view[name], parts, table)
            views.append(new)
        return tuple(views), names if any(moved) else []

    def _has_tokens(self, name: str) -> bool:
        """Whether a tensor has a row for each token, in every source."""
        if not any(word in name for word in _WORDS) or "position" in name:
            return False
        return all(
            name in view and bool(view[name].shape) and view[name].shape[0] == rows
            for view, rows in zip(self._views, self._rows, strict=True)
        )

    def _ids(self, vocabulary: Mapping[str, int]) -> Mapping[int, int] | None:
        """How the numbers in the donor's config change."""
        tokens = {number: t for t, number in self._tokens[self._donor].items()}
        moved = {n: vocabulary[t] for n, t in tokens.items() if t in vocabulary}
        return None if all(a == b for a, b in moved.items()) else moved


def _vocabulary(source: Source) -> Mapping[str, int]:
    """Token -> number; empty for a model without a tokenizer."""
    listed = read_vocabulary(source)
    return listed if listed or not opaque_files(source) else converted_vocabulary(source)


def _height(source: Source, view: View) -> int:
    """Rows of a source's input embedding."""
    found = [ref.shape[0] for name, ref in view.items()
             if name.endswith(EMBEDDINGS) and len(ref.shape) == 2]  # fmt: skip
    wanted = text_config(source.config).get("vocab_size")
    if isinstance(wanted, int) and wanted in found:
        return wanted
    if not found:
        raise SourceError("has no input embedding whose rows could be rearranged",
                          model=source.label)  # fmt: skip
    return max(found)
