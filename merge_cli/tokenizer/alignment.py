"""Giving all sources one vocabulary: from which model's row each token's row comes.

    tokenizers ─▶ the output's tokens ─▶ for each model: rows ─▶ computed embeddings and heads

Rows that a model lacks are filled in (`rows`); rows beyond a tokenizer (padding) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.permuted_rows import PermutedRows, SourceRows, padded
from merge_cli.checkpoint.tensors import Tensor, TensorMap
from merge_cli.errors import MergeCliError, RecipeError, SourceError
from merge_cli.recipe.reference import local_folder, parse_reference
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import BASE, UNION
from merge_cli.sources.opening import open_tokenizer
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary
from merge_cli.tokenizer.conversion import tokenizer_document
from merge_cli.tokenizer.embeddings import embedding_rows_of, names_with_tokens
from merge_cli.tokenizer.files import check_numbers, opaque_files, read_vocabulary, tokens_of
from merge_cli.tokenizer.rows import SourceVocabulary, TokenAligner
from merge_cli.tokenizer.truncation import truncated
from merge_cli.tokenizer.union import join


def align(
    recipe: Recipe,
    sources: Sequence[Source],
    tensors: Sequence[TensorMap],
    base: int | None,
    config_index: int,
) -> AlignedVocabulary:
    """Bring the sources' embeddings and heads into the order that the recipe asks for.

    Args:
        tensors: of each source, as `planning.heads` has reconciled them.
        config_index: the source whose config the output takes.

    Raises:
        RecipeError: a token or a model that does not exist.
        SourceError: a tokenizer that cannot be read, or to which nothing can be added.
    """
    spec = recipe.tokenizer
    if spec is None:
        return AlignedVocabulary(tuple(tensors), config_index)
    if spec.truncate:
        return truncated(sources, tensors, config_index)
    return _Alignment(recipe, sources, tensors, base, config_index).result()


class _Alignment:
    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        tensors: Sequence[TensorMap],
        base: int | None,
        config_index: int,
    ) -> None:
        assert recipe.tokenizer is not None
        self._recipe, self._spec = recipe, recipe.tokenizer
        self._sources, self._tensors = sources, tensors
        self._base, self._config_index = base, config_index
        self._notes: list[str] = []
        self._documents: dict[Path, dict[str, Any]] = {}  # tokenizers, each read once
        self._first = base if base is not None else 0
        self._tokenizer_model: Source | None = None
        self._tokenizer_index = (
            self._first if self._spec.source == UNION else self._source_index(self._spec.source)
        )
        self._tokens = [self._vocabulary(source) for source in sources]
        self._assume_vocabularies()
        self._rows = [embedding_rows_of(s, v) for s, v in zip(sources, tensors, strict=True)]
        for source, tokens, rows in zip(sources, self._tokens, self._rows, strict=True):
            check_numbers(source, tokens, rows)

    def result(self) -> AlignedVocabulary:
        chosen, vocabulary, files = self._output()
        embedding_rows = self._rows[chosen] if self._tokenizer_model is None else 0
        used_rows = max(embedding_rows, max(vocabulary.values(), default=-1) + 1)
        rows = used_rows
        multiple = self._spec.pad_to_multiple_of
        if multiple:
            rows = -(-rows // multiple) * multiple
        vocabularies = [
            SourceVocabulary(*fields)
            for fields in zip(
                (source.label for source in self._sources), self._tokens, self._rows, strict=True
            )
        ]
        aligner = TokenAligner(self._recipe, vocabularies, self._base, self._index)
        tables = [
            padded(table, rows, vocabulary.values())
            for table in aligner.tables(vocabulary, used_rows)
        ]
        if aligner.problems:
            raise RecipeError(aligner.problems)
        self._notes += aligner.notes
        if rows > used_rows:
            self._notes.append(
                f"vocabulary: {rows - used_rows} rows of padding are the mean of the tokens' rows"
            )
        tensors, changed = self._rearrange(tables, rows)
        if changed:
            self._notes.append(
                f"vocabulary: {rows} rows, {len(vocabulary)} tokens; {', '.join(changed)} "
                "rearranged"
            )
        ids = self._ids(vocabulary)
        notes = tuple(self._notes)
        return AlignedVocabulary(
            tensors, chosen, files, rows, ids, notes, bool(changed), self._tokenizer_model
        )

    def _assume_vocabularies(self) -> None:
        """Give models without tokenizer files the base's vocabulary."""
        assumed = self._tokens[self._first]
        if not assumed:
            message = "has no tokenizer, so that the meaning of its rows is unknown"
            raise SourceError(message, model=self._sources[self._first].label)
        for i, tokens in enumerate(self._tokens):
            if tokens:
                continue
            source = self._sources[i]
            self._tokens[i] = assumed
            first = self._sources[self._first].label
            self._notes.append(f"{source.label}: has no tokenizer; taken to have {first}'s")

    def _output(self) -> tuple[int, Mapping[str, int], Mapping[str, bytes]]:
        """The source of the tokenizer files, the output's tokens, and the files that differ."""
        tokenizer_index = self._tokenizer_index
        others = []
        if self._spec.source == UNION:
            others = [
                (self._sources[i], self._with_rows(i))
                for i in range(len(self._sources))
                if i != self._first
            ]
        source = self._tokenizer_model or self._sources[tokenizer_index]
        tokens = (
            self._vocabulary(source) if self._tokenizer_model else self._tokens[tokenizer_index]
        )
        union = join(source, others, tokens, list(self._spec.tokens), self._document)
        self._notes += union.notes
        return tokenizer_index, union.vocabulary, union.files

    def _with_rows(self, index: int) -> Mapping[str, int]:
        """A source's tokens that have a row of its embedding."""
        tokens, rows = self._tokens[index], self._rows[index]
        with_rows = {token: number for token, number in tokens.items() if number < rows}
        if len(with_rows) < len(tokens):
            label, count = self._sources[index].label, len(tokens) - len(with_rows)
            self._notes.append(f"tokenizer: {count} tokens of {label} have no row and are left out")
        return with_rows

    def _vocabulary(self, source: Source) -> Mapping[str, int]:
        """Token -> number; empty for a model without a tokenizer."""
        if (source.root / "tokenizer.json").exists():
            return tokens_of(self._document(source))
        listed = read_vocabulary(source)
        return tokens_of(self._document(source)) if not listed and opaque_files(source) else listed

    def _document(self, source: Source) -> dict[str, Any]:
        """A model's tokenizer.json, or what stands for it."""
        if source.root not in self._documents:
            self._documents[source.root] = tokenizer_document(source)
        return self._documents[source.root]

    def _source_index(self, word: str) -> int:
        """The source that `base` or a model's name means; for others, their count."""
        if word == BASE:
            if self._base is None:
                label = self._sources[self._config_index].label
                self._notes.append(f"tokenizer: no base_model; taken from {label}, listed first")
            return self._config_index if self._base is None else self._base
        index = self._index(word)
        if index is None:
            self._tokenizer_model = self._open_tokenizer_model(word)
            self._notes.append(f"tokenizer: {word}'s, a model that is not merged")
            return len(self._sources)
        return index

    def _open_tokenizer_model(self, word: str) -> Source:
        folder = self._recipe.folder
        try:
            model = open_tokenizer(parse_reference(word, folder), folder)
            listed = bool(self._vocabulary(model))
        except MergeCliError as error:
            message = (
                f"'{word}' is not one of the recipe's models, and not a tokenizer: {error.message}."
            )
            hint = "Use `union`, `base`, one of them, or another model's folder or Hub id."
            raise RecipeError([self._recipe.problem(self._spec.key, message, hint)]) from error
        if not listed:
            message = f"'{word}' has no tokenizer."
            raise RecipeError([self._recipe.problem(self._spec.key, message)])
        return model

    def _index(self, word: str) -> int | None:
        folder = local_folder(word, self._recipe.folder)
        for i, source in enumerate(self._sources):
            source_folder = local_folder(source.label, self._recipe.folder)
            if source.label == word or (
                folder and source_folder and folder.resolve() == source_folder.resolve()
            ):
                return i
        return None

    def _rearrange(
        self, tables: Sequence[SourceRows], rows: int
    ) -> tuple[tuple[TensorMap, ...], list[str]]:
        """Each source's tensors with rows in the output's order, and the names of what moved."""
        import numpy as np

        names = names_with_tokens(self._tensors, self._rows)
        moved = [
            not (
                rows == self._rows[i]
                and bool((table.part == i).all())
                and bool((table.row == np.arange(rows)).all())
            )
            for i, table in enumerate(tables)
        ]
        rearranged = []
        for tensors, table, changed in zip(self._tensors, tables, moved, strict=True):
            copy: dict[str, Tensor] = dict(tensors)
            if changed:
                for name in names:
                    parts = tuple(other[name] for other in self._tensors)
                    copy[name] = PermutedRows(tensors[name], parts, table)
            rearranged.append(copy)
        return tuple(rearranged), names if any(moved) else []

    def _ids(self, vocabulary: Mapping[str, int]) -> Mapping[int, int] | None:
        """How token numbers in the config change."""
        before = self._tokens[self._config_index]
        if before == vocabulary:
            return None
        tokens = {number: token for token, number in before.items()}
        moved = {n: vocabulary[t] for n, t in tokens.items() if t in vocabulary}
        return None if [*moved] == [*moved.values()] else moved
