"""The sources' data as a recipe names it: files, rows, token sequences."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from merge_cli.data.rows import read_data
from merge_cli.errors import SourceError
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.rows import Row, content_of, encode
from merge_cli.evaluation.tokens import Encoded
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe


def within(examples: tuple[Example, ...], tokens: int | None) -> tuple[Example, ...]:
    """The first sequences that have about so many tokens together; one at least."""
    if tokens is None or not examples:
        return examples
    ends = list(accumulate(len(example.ids) for example in examples))
    return examples[: max(1, bisect_right(ends, tokens))]


def sequences(
    rows: Iterable[Row],
    tokenizer: Any,
    length: int,
    most: int | None,
    *,
    whole: bool = False,
    start: Sequence[int] | None = None,
    entries: int | None = None,
) -> list[Example]:
    """Rows in pieces of at most `length` tokens, until there are `most` of them.

    Args:
        whole: tokens of a prompt count, too.
        start, entries: as for `encode`.
    """
    result: list[Example] = []
    for row in rows:
        encoded = encode(row, tokenizer, start=start, entries=entries)
        if whole:
            encoded = Encoded(encoded.ids, 1)
        result.extend(cut(encoded, length))
        if most is not None and len(result) >= most:
            return result[:most]
    return result


def cut(encoded: Encoded, length: int) -> Iterator[Example]:
    """A row in pieces of at most `length` tokens; pieces without a token that counts are dropped.

    Pieces overlap by one token, so that every token that counts is predicted exactly once.
    """
    ids, first = encoded.ids, encoded.first
    start = 0
    while start + 1 < len(ids):
        part = ids[start : start + length]
        counts = max(1, first - start)
        if counts < len(part):
            yield Example(array("i", part), counts)
        start += length - 1


def data_files(words: Sequence[str], recipe: Recipe) -> list[Path]:
    """Where a recipe's data files are.

    Raises:
        SourceError: one is not there.
    """
    paths = [local_file(word, recipe.folder) for word in words]
    for word, path in zip(words, paths, strict=True):
        if path is None:
            raise SourceError("no such data file", file=word)
    return [path for path in paths if path is not None]


def source_rows(recipe: Recipe) -> Iterator[Row]:
    """Every row of the sources' data, held out or not.

    Raises:
        SourceError, ResourceError: as `read_data` does.
    """
    for source in recipe.source_specs:
        if source.data is not None:
            yield from read_data(source.data, data_files(source.data.files, recipe))
            if source.data.held_out:
                files = data_files(source.data.held_out, recipe)
                yield from read_data(source.data, files, held_out=True)


def source_contents(recipe: Recipe) -> set[bytes]:
    """What the rows of the sources' data say (`evaluation.rows.content_of`)."""
    return {content_of(row) for row in source_rows(recipe)}


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path or id; whole where that would not tell them apart.

    No two are equal: sums are kept by name, and one of two namesakes would get both.
    """
    short = [path.rstrip("/").rpartition("/")[2] for path in paths]
    names = short if len(set(short)) == len(short) else list(paths)
    result: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in result:
            number += 1
            unique = f"{name} ({number})"
        result.append(unique)
    return result
