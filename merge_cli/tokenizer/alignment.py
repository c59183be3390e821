"""One vocabulary for all sources: which row of which model each token's row is.

    tokenizers ─▶ the output's tokens ─▶ for each model: rows ─▶ computed embeddings and heads

What a model lacks is filled in (`rows`); rows beyond a tokenizer (padding) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.rearranged import PermutedRows, SourceRows, padded
from merge_cli.checkpoint.tensors import EMBEDDINGS, Tensor, TensorMap
from merge_cli.errors import MergeCliError, RecipeError, SourceError
from merge_cli.recipe.reference import local_folder, parse_reference
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import BASE, UNION
from merge_cli.sources.source import Source, open_tokenizer
from merge_cli.tokenizer.files import (
    check_numbers,
    converted_vocabulary,
    opaque_files,
    read_vocabulary,
)
from merge_cli.tokenizer.rows import Key, SourceVocabulary, TokenAligner
from merge_cli.tokenizer.union import join

# What tensors with a row for each token are called, whatever the architecture.
_WORDS = (
    "embed",
    "wte",
    "lm_head",
    "shared.weight",
    "output.weight",
    "decoder.weight",
    "decoder.bias",
    "predictions.bias",
    "final_logits_bias",
    "logits",
    "head",
)


@dataclass(frozen=True)
class AlignedVocabulary:
    """Sources with one vocabulary.

    Attributes:
        views: for each source, its tensors.
        donor: index of the source whose tokenizer files the output has; behind the last one for
            `guest`.
        files: tokenizer files that differ from the donor's.
        rows: of the output's embeddings; None leaves the config's word.
        ids: token's number in the config donor -> in the output; None where nothing moves.
        notes: what was done.
        changed: whether any tensor was rearranged.
        guest: a model that is not merged and gives the tokenizer files.
    """

    views: tuple[TensorMap, ...]
    donor: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    rows: int | None = None
    ids: Mapping[int, int] | None = None
    notes: tuple[str, ...] = ()
    changed: bool = False
    guest: Source | None = None

    def need_plain(self, recipe: Recipe, work: str) -> None:
        """For what runs the sources as they are.

        Raises:
            RecipeError: rows were rearranged.
        """
        if self.changed or self.files or self.guest is not None:
            message = f"{work} runs the models, which must share a vocabulary."
            hint = "Bring them to one vocabulary first: merge each alone, with this section."
            key = "tokenizer" if "tokenizer" in recipe.places else "tokenizer_source"
            raise RecipeError([recipe.problem(key, message, hint)])


def align(
    recipe: Recipe,
    sources: Sequence[Source],
    views: Sequence[TensorMap],
    base: int | None,
    donor: int,
) -> AlignedVocabulary:
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
        return AlignedVocabulary(tuple(views), donor)
    if spec.truncate:
        return truncated(sources, views, donor)
    return _Alignment(recipe, sources, views, base, donor).result()


def truncated(
    sources: Sequence[Source], views: Sequence[TensorMap], donor: int
) -> AlignedVocabulary:
    """Every model with as many rows as the smallest has: mergekit's unsafe-truncate-embeddings."""
    import numpy as np

    heights = [_height(source, view) for source, view in zip(sources, views, strict=True)]
    cut: list[dict[str, Tensor]] = [dict(view) for view in views]
    notes = []
    for name in filter(_is_vocabulary, views[0]):
        parts = [view[name] for view in views if name in view]
        counts = [part.shape[0] if part.shape else 0 for part in parts]
        widths = {part.shape[1:] for part in parts}
        rows = min(counts)
        if len(parts) < len(views) or len(widths) > 1 or max(counts) == rows:
            continue
        for i, (new, count) in enumerate(zip(cut, counts, strict=True)):
            if count > rows:
                table = SourceRows(np.full(rows, i, np.int32), np.arange(rows, dtype=np.int64), {})
                new[name] = PermutedRows(parts[i], tuple(parts), table)
        longer = [f"{s.label} {n}" for s, n in zip(sources, counts, strict=True) if n > rows]
        notes.append(f"vocabulary: {name} is cut to {rows} rows ({', '.join(longer)})")
    if not notes:
        return AlignedVocabulary(tuple(views), donor, notes=("vocabulary: nothing to truncate",))
    notes.append(
        "vocabulary: cutting is right only where the same number means the same token in every "
        "model; the tokenizer's files stay as they are"
    )
    return AlignedVocabulary(tuple(cut), donor, rows=min(heights), notes=tuple(notes), changed=True)


class _Alignment:
    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        views: Sequence[TensorMap],
        base: int | None,
        donor: int,
    ) -> None:
        assert recipe.tokenizer is not None
        self._recipe, self._spec = recipe, recipe.tokenizer
        self._sources, self._views = sources, views
        self._base, self._donor = base, donor
        self._notes: list[str] = []
        self._first = base if base is not None else 0
        self._guest: Source | None = None
        self._chosen = self._first if self._spec.source == UNION else self._named(self._spec.source)
        self._tokens = [_vocabulary(source) for source in sources]
        self._fill_in()
        self._rows = [_height(s, v) for s, v in zip(sources, views, strict=True)]
        for source, tokens, rows in zip(sources, self._tokens, self._rows, strict=True):
            check_numbers(source, tokens, rows)

    def result(self) -> AlignedVocabulary:
        chosen, vocabulary, files = self._output()
        own_rows = self._rows[chosen] if self._guest is None else 0
        filled = max([own_rows, *(number + 1 for number in vocabulary.values())])
        rows = filled
        multiple = self._spec.pad_to_multiple_of
        if multiple:
            rows = -(-rows // multiple) * multiple
        keys: list[Key] = list(range(filled))
        for token, number in vocabulary.items():
            keys[number] = token
        words = [
            SourceVocabulary(*item)
            for item in zip(
                (source.label for source in self._sources), self._tokens, self._rows, strict=True
            )
        ]
        filling = TokenAligner(self._recipe, words, self._base, self._index)
        tables = [padded(table, rows, vocabulary.values()) for table in filling.tables(keys)]
        if filling.problems:
            raise RecipeError(filling.problems)
        self._notes += filling.notes
        if rows > filled:
            self._notes.append(
                f"vocabulary: {rows - filled} rows of padding are the mean of the tokens' rows"
            )
        views, changed = self._gather(tables, rows)
        if changed:
            self._notes.append(
                f"vocabulary: {rows} rows, {len(vocabulary)} tokens; {', '.join(changed)} "
                "rearranged"
            )
        ids = self._ids(vocabulary)
        notes = tuple(self._notes)
        return AlignedVocabulary(views, chosen, files, rows, ids, notes, bool(changed), self._guest)

    def _fill_in(self) -> None:
        """A model without tokenizer files counts its rows as the base does."""
        known = self._tokens[self._first]
        if not known:
            message = "has no tokenizer, so that nobody can tell what its rows mean"
            raise SourceError(message, model=self._sources[self._first].label)
        for i, tokens in enumerate(self._tokens):
            if tokens:
                continue
            source = self._sources[i]
            self._tokens[i] = known
            first = self._sources[self._first].label
            self._notes.append(f"{source.label}: has no tokenizer; taken to have {first}'s")

    def _output(self) -> tuple[int, Mapping[str, int], Mapping[str, bytes]]:
        """Whose files the output has, its tokens, and the files that are its own."""
        chosen = self._chosen
        others = []
        if self._spec.source == UNION:
            others = [
                (self._sources[i], self._with_rows(i))
                for i in range(len(self._sources))
                if i != self._first
            ]
        source = self._guest or self._sources[chosen]
        own = _vocabulary(source) if self._guest else self._tokens[chosen]
        union = join(source, others, own, list(self._spec.tokens))
        self._notes += union.notes
        return chosen, union.vocabulary, union.files

    def _with_rows(self, index: int) -> Mapping[str, int]:
        """A source's tokens, but for those that its embedding has no row for."""
        tokens, rows = self._tokens[index], self._rows[index]
        kept = {token: number for token, number in tokens.items() if number < rows}
        if len(kept) < len(tokens):
            label, count = self._sources[index].label, len(tokens) - len(kept)
            self._notes.append(f"tokenizer: {count} tokens of {label} have no row and are left out")
        return kept

    def _named(self, word: str) -> int:
        """The source that `base`, or a model's name, means; behind the last one for a guest."""
        if word == BASE:
            if self._base is None:
                label = self._sources[self._donor].label
                self._notes.append(f"tokenizer: no base_model; taken from {label}, listed first")
            return self._donor if self._base is None else self._base
        result = self._index(word)
        if result is None:
            self._guest = self._open_guest(word)
            self._notes.append(f"tokenizer: {word}'s, a model that is not merged")
            return len(self._sources)
        return result

    def _open_guest(self, word: str) -> Source:
        folder = self._recipe.folder
        try:
            guest = open_tokenizer(parse_reference(word, folder), folder)
            listed = bool(_vocabulary(guest))
        except MergeCliError as error:
            message = f"'{word}' is none of the recipe's models, and no tokenizer: {error.what}."
            hint = "Use `union`, `base`, one of them, or another model's folder or Hub id."
            raise RecipeError([self._recipe.problem(self._spec.key, message, hint)]) from error
        if not listed:
            message = f"'{word}' has no tokenizer."
            raise RecipeError([self._recipe.problem(self._spec.key, message)])
        return guest

    def _index(self, word: str) -> int | None:
        place = local_folder(word, self._recipe.folder)
        for i, source in enumerate(self._sources):
            own = local_folder(source.label, self._recipe.folder)
            if source.label == word or (place and own and place.resolve() == own.resolve()):
                return i
        return None

    def _gather(
        self, tables: Sequence[SourceRows], rows: int
    ) -> tuple[tuple[TensorMap, ...], list[str]]:
        """Every source's tensors, those with a row for each token rearranged; their names."""
        import numpy as np

        names = _names_with_tokens(self._views, self._rows)
        moved = [
            not (
                rows == self._rows[i]
                and bool((table.part == i).all())
                and bool((table.row == np.arange(rows)).all())
            )
            for i, table in enumerate(tables)
        ]
        views = []
        for view, table, changed in zip(self._views, tables, moved, strict=True):
            new: dict[str, Tensor] = dict(view)
            if changed:
                for name in names:
                    parts = tuple(other[name] for other in self._views)
                    new[name] = PermutedRows(view[name], parts, table)
            views.append(new)
        return tuple(views), names if any(moved) else []

    def _ids(self, vocabulary: Mapping[str, int]) -> Mapping[int, int] | None:
        """How the numbers in the donor's config change."""
        tokens = {number: t for t, number in self._tokens[self._donor].items()}
        moved = {n: vocabulary[t] for n, t in tokens.items() if t in vocabulary}
        return None if all(a == b for a, b in moved.items()) else moved


def _names_with_tokens(views: Sequence[TensorMap], heights: Sequence[int]) -> list[str]:
    """The tensors that have a row for each token, in every source."""

    def has(name: str) -> bool:
        return all(
            name in view and bool(view[name].shape) and view[name].shape[0] == rows
            for view, rows in zip(views, heights, strict=True)
        )

    return [name for name in views[0] if _is_vocabulary(name) and has(name)]


def _is_vocabulary(name: str) -> bool:
    return any(word in name for word in _WORDS) and "position" not in name


def _vocabulary(source: Source) -> Mapping[str, int]:
    """Token -> number; empty for a model without a tokenizer."""
    listed = read_vocabulary(source)
    return listed if listed or not opaque_files(source) else converted_vocabulary(source)


def _height(source: Source, view: TensorMap) -> int:
    """Rows of a source's input embedding."""
    found = [
        ref.shape[0]
        for name, ref in view.items()
        if name.endswith(EMBEDDINGS) and len(ref.shape) == 2
    ]
    requested = text_config(source.config).get("vocab_size")
    if isinstance(requested, int) and requested in found:
        return requested
    if not found:
        raise SourceError(
            "has no input embedding whose rows could be rearranged", model=source.label
        )
    return max(found)
