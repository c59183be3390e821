"""Stored tensors that are taken for copies of one another, held against each other.

A plan knows names and shapes; whether two tensors are equal is known when they can be read, which
is before the merge of them begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.stored import read_numbers, reading
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.errors import SourceError

_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True)
class Copies:
    """Two stored tensors of a source that are taken to be one.

    Attributes:
        dropped: whether the second is left out, so that it must be a copy.
        tied: whether the config's word is enough: then it is left out in any case, which is told.
    """

    one: Tensor
    other: Tensor
    dropped: bool
    tied: bool = False


def compare_copies(copies: Sequence[Copies]) -> tuple[str, ...]:
    """A line for each pair that is none.

    Raises:
        SourceError: a tensor that would be left out as a copy and is none.
        CorruptFileError: a file that cannot be read.
    """
    notes = []
    with reading() as read:
        for pair in copies:
            place = _first_difference(pair, read)
            if place is None:
                continue
            one, other = pair.one, pair.other
            what = f"differs from {one.name} (first at element {place}): it is no copy of it"
            if pair.dropped and not pair.tied:
                hint = "Merge with a base that stores both; or remove it, if it is not meant."
                raise SourceError(what, model=other.model, tensor=other.name, hint=hint)
            done = "and is merged by itself"
            if pair.tied:
                done = (
                    "and is left out all the same, since the config ties them; if it is meant, say "
                    "`tie_word_embeddings: false` in the model's config.json"
                )
            notes.append(f"{other.model}: {other.name} {what}, {done}")
    return tuple(notes)


def _first_difference(pair: Copies, read: Read) -> int | None:
    import numpy as np

    if pair.one.shape != pair.other.shape:
        return 0
    for start in range(0, pair.one.size, _AT_ONCE):
        count = min(_AT_ONCE, pair.one.size - start)
        one, other = (read_numbers(read, t, start, count) for t in (pair.one, pair.other))
        if not np.array_equal(one, other, equal_nan=True):
            return start + int(np.flatnonzero(~((one == other) | np.isnan(one)))[0])
    return None
