"""Tensors that a plan takes to be equal. Whether they are is not in the headers.

`compare` reads them before anything is learned, searched or merged. A model may store tied weights
several times: one of the copies is merged, or each by itself. Integers have no mean: one model's
are copied, and another model's must be the same. Masks and positions are. The codes of quantised
weights are not, and without the word of a config nobody could tell that they are codes. Nor is a
weight that one model stores as numbers and another as integers: headers tell that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import MERGEABLE, width_of
from merge_cli.checkpoint.tensors import Read, Tensor, read_numbers, reading
from merge_cli.errors import Problem, SourceError

_AT_ONCE = 1 << 20  # elements
# Rows of counters and flags may differ: they say nothing of the weights, and no weight is a row of
# them. A matrix might be one.
_MAY_DIFFER = ("I64", "U64", "BOOL")


@dataclass(frozen=True)
class Copies:
    """Two stored tensors of a source that are taken to be one.

    Attributes:
        dropped: whether the second is left out, so that it must be a copy.
        tied: whether the config's word is enough: then it is left out in any case, which is told.
    """

    first: Tensor
    second: Tensor
    dropped: bool
    tied: bool = False

    def differing(self, element: int) -> str:
        """What is told of a second tensor that is no copy.

        Raises:
            SourceError: it would be left out.
        """
        first, second = self.first, self.second
        message = f"differs from {first.name} (first at element {element}): it is no copy of it"
        if self.dropped and not self.tied:
            hint = "Merge with a base that stores both; or remove it, if it is not meant."
            raise SourceError(message, model=second.model, tensor=second.name, hint=hint)
        done = "and is merged by itself"
        if self.tied:
            done = (
                "and is left out all the same, since the config ties them; if it is meant, say "
                "`tie_word_embeddings: false` in the model's config.json"
            )
        return f"{second.model}: {second.name} {message}, {done}"


_CODES = (
    "If they are the codes of quantised weights, config.json must say how to read them "
    "(`quantization_config`)."
)


@dataclass(frozen=True)
class Integers:
    """A tensor of integers, or of complex numbers, in two models; the first one's is copied."""

    first: Tensor
    second: Tensor

    def differing(self, element: int) -> str:
        """Never returns.

        Raises:
            SourceError: always, since what was copied would be wrong for the second model.
        """
        first, second = self.first, self.second
        kind = "complex numbers" if first.dtype.startswith("C") else "integers"
        message = f"holds other {kind} than {first.model} (first at element {element})"
        hint = f"{kind.capitalize()} are not merged. {_CODES}"
        raise SourceError(message, model=second.model, tensor=second.name, hint=hint)


def unlike_dtypes(name: str, tensors: Sequence[Tensor], labels: Sequence[str]) -> Problem | None:
    """Why one tensor of each model, of which some are not floats, cannot be taken for the first.

    Args:
        tensors: of one shape, of which the first would be copied.
        labels: of their models.
    """
    if tensors[0].size < 2 or len(_kinds(tensors)) == 1:
        return None
    stored = [f"{label} {tensor.dtype}" for label, tensor in zip(labels, tensors, strict=True)]
    message = f"it is not stored as numbers of one kind: {', '.join(dict.fromkeys(stored))}"
    return Problem(message, name, hint=f"Only floats are merged. {_CODES}")


def _kinds(tensors: Sequence[Tensor]) -> set[str]:
    """Their dtypes; those of floats, which can be merged, are one."""
    return {"" if tensor.dtype in MERGEABLE else tensor.dtype for tensor in tensors}


def integers_of(tensors: Sequence[Tensor]) -> list[Integers]:
    """What to compare where one tensor of each model stands under a name, and the first is copied.

    Args:
        tensors: of one shape and dtype.
    """
    first, *others = tensors
    if first.size < 2 or (first.dtype in _MAY_DIFFER and first.size == max(first.shape)):
        return []  # a counter, or a row of them
    return [Integers(first, other) for other in others]


def compare(pairs: Sequence[Copies | Integers]) -> tuple[str, ...]:
    """A line for each pair that differs, and may.

    Raises:
        SourceError: a pair that may not.
        CorruptFileError: a file that cannot be read.
    """
    with reading() as read:
        differences = [(pair, _first_difference(pair.first, pair.second, read)) for pair in pairs]
        return tuple(pair.differing(at) for pair, at in differences if at is not None)


def _first_difference(first: Tensor, second: Tensor, read: Read) -> int | None:
    """The first element at which two tensors differ."""
    import numpy as np

    if first.shape != second.shape:
        return 0
    are_numbers = {first.dtype, second.dtype} <= {*MERGEABLE}
    if not are_numbers and first.dtype != second.dtype:
        return 0
    for start in range(0, first.size, _AT_ONCE):
        count = min(_AT_ONCE, first.size - start)
        if are_numbers:
            a, b = (read_numbers(read, tensor, start, count) for tensor in (first, second))
            same = (a == b) | (np.isnan(a) & np.isnan(b))
        else:
            a, b = (_raw(read, tensor, start, count) for tensor in (first, second))
            same = (a == b).all(axis=1)
        if not same.all():
            return start + int(np.flatnonzero(~same)[0])
    return None


def _raw(read: Read, tensor: Tensor, start: int, count: int) -> Any:
    """Elements [start, start + count) as bytes: numpy uint8 [count, width]."""
    import numpy as np

    width = width_of(tensor.dtype)
    raw = np.empty(count * width, np.uint8)
    tensor.fill(read, start, raw.data)
    return raw.reshape(count, width)
