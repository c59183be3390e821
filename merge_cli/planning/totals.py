"""What the tasks of a plan are together: elements, inputs, dtypes.

A plan has 100,000 tasks, and is asked several times: each answer looks at whole columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor

if TYPE_CHECKING:
    from merge_cli.planning.plan import TensorTask


def element_count(tasks: Sequence[TensorTask]) -> int:
    """Elements of all outputs."""
    return sum(math.prod(shape) * count for shape, count in _shapes(tasks).items())


def largest(tasks: Sequence[TensorTask]) -> int:
    """Elements of the largest output; 0 where there are none."""
    return max(map(math.prod, _shapes(tasks)), default=0)


def _shapes(tasks: Sequence[TensorTask]) -> Counter[tuple[int, ...]]:
    """The shapes, of which thousands of tensors have few."""
    first_operands = map(itemgetter(0), map(attrgetter("operands"), tasks))
    return Counter(map(attrgetter("shape"), first_operands))


def inputs_of(tasks: Sequence[TensorTask]) -> Iterator[Tensor]:
    """All bases, then all operands."""
    bases = filter(None, map(attrgetter("base"), tasks))
    return chain(bases, chain.from_iterable(map(attrgetter("operands"), tasks)))


class InputTotals(NamedTuple):
    """What tasks read.

    Attributes:
        nbytes: of all inputs as they are stored.
        files: where these are.
        derived: the inputs that are computed from stored ones.
    """

    nbytes: int
    files: frozenset[Path]
    derived: Sequence[Tensor]


def input_totals(tasks: Sequence[TensorTask]) -> InputTotals:
    inputs = [*inputs_of(tasks)]
    stored = [tensor for tensor in inputs if isinstance(tensor, TensorRef)]
    derived: list[Tensor] = []
    if len(stored) < len(inputs):
        derived = [tensor for tensor in inputs if not isinstance(tensor, TensorRef)]
        stored += chain.from_iterable(map(attrgetter("stored"), derived))
    paths = [*map(attrgetter("path"), stored)]
    files = dict(zip(map(id, paths), paths, strict=True))  # a path takes long to hash
    nbytes = sum(map(attrgetter("nbytes"), stored))
    return InputTotals(nbytes, frozenset(files.values()), derived)


def computed_of(tasks: Sequence[TensorTask]) -> Sequence[TensorTask]:
    """The tasks whose bytes are not an operand's."""
    if {*map(attrgetter("action"), tasks)} == {"merge"} and not any(
        map(attrgetter("encoding"), tasks)
    ):
        return tasks
    return [task for task in tasks if not task.moved]


def dtypes_of(tasks: Sequence[TensorTask]) -> frozenset[str]:
    """The dtypes that tasks read, and those that they write; but codes have loops of their own."""
    plain = (task.dtype for task in tasks if task.encoding is None)
    return frozenset(chain(map(attrgetter("dtype"), inputs_of(tasks)), plain))


def most_inputs(tasks: Sequence[TensorTask]) -> int:
    """How many tensors are read for one, at most; 1 where there are none."""
    kinds = zip(map(attrgetter("operands"), tasks), map(attrgetter("base"), tasks), strict=True)
    return max((len(operands) + bool(base) for operands, base in kinds), default=1)
