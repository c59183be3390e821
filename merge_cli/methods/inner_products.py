"""Inner products of a tensor's operands: what all methods with angles need to know of them.

Means on a sphere stay in the span of what they are means of, so their result is a weighted sum of
the operands, and the weights follow from inner products alone: one streamed pass, whatever the size
of the tensor. Sums are float64 and do not depend on blocks (see `kernels.reduce`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from merge_cli.kernels import reduce
from merge_cli.kernels.backend import Array, like, to_numpy
from merge_cli.kernels.fused import StoredBlock
from merge_cli.kernels.passes import dot_products
from merge_cli.kernels.reduce import dot_runs, exact_sum
from merge_cli.methods.blocks import Block, TensorBlocks, load_whole, map_stored

Along = Literal["rows", "columns"]


def gram_matrix(tensor: TensorBlocks) -> Any:
    """<x_i, x_j> over the whole tensor: numpy float64 [sources, sources]."""
    import numpy as np

    def products(blocks: Iterator[Block]) -> list[list[float]]:
        result: dict[tuple[int, int], list[float]] = {}
        for block in blocks:
            for i, j in _pairs(len(block.operands)):
                runs = dot_runs(block.operands[i], block.operands[j])
                result.setdefault((i, j), []).extend(runs)
        return list(result.values())

    def stored_products(blocks: Iterable[StoredBlock]) -> list[list[float]]:
        return dot_products(blocks, reduce.BLOCK_MULTIPLE)

    spans = map_stored(tensor, stored_products)
    if spans is None:
        spans = tensor.map(products)
    sums = [exact_sum(parts) for parts in zip(*spans, strict=True)]
    count = int(((8 * len(sums) + 1) ** 0.5 - 1) / 2)
    gram = np.empty((count, count))
    for (i, j), value in zip(_pairs(count), sums, strict=True):
        gram[i, j] = gram[j, i] = value
    return gram


def gram_matrices(tensor: TensorBlocks, along: Along) -> Any:
    """The same for each row (the last dimension) or column (the first): [n, sources, sources].

    The tensor is held whole. A tensor of one dimension is one row, and all columns of length 1.
    """
    import numpy as np

    operands = [to_numpy(x).astype(np.float64) for x in load_whole(tensor)[1]]
    axis = -1 if along == "rows" else 0
    count = len(operands)
    result: Any = None
    for i, j in _pairs(count):
        sums = np.atleast_1d((operands[i] * operands[j]).sum(axis)).reshape(-1)
        if result is None:
            result = np.empty((len(sums), count, count))
        result[:, i, j] = result[:, j, i] = sums
    return result


class SliceCoefficients:
    """A coefficient for each row or column of a tensor, for each source, handed out by spans.

    Args:
        values: float64 [n, sources].
        shape: of the tensor.
        along: whether there is one for each row, or for each slice along the first dimension.
    """

    def __init__(self, values: Any, shape: Sequence[int], along: Along) -> None:
        import numpy as np

        self._values = values
        self._along = along
        last = shape[-1] if shape else 1
        elements = int(np.prod(shape)) if shape else 1
        self._width = last if along == "rows" else elements // max(shape[0] if shape else 1, 1)

    def of(self, source: int, start: int, operand: Array) -> Array:
        """The coefficients of a flat span of an operand, an array of the same kind."""
        import numpy as np

        elements = np.arange(start, start + len(operand))
        index = elements // self._width if self._along == "rows" else elements % self._width
        return like(operand, self._values[index, source])

    def sum_of(self, operands: Sequence[Array], start: int) -> Array:
        """Sum of c_i * x_i over a span, products and sums rounded one by one."""
        total: Array = None
        for source, operand in enumerate(operands):
            term = operand * self.of(source, start, operand)
            total = term if total is None else total + term
        return total


def along_great_circle(cosine: float, t: float) -> list[float]:
    """The coefficients of two unit vectors for a walk from one (t=0) to the other (t=1).

    sin((1-t)θ)/sin θ and sin(tθ)/sin θ, with θ the angle between them, which must not be 0 or π.
    """
    theta = math.acos(cosine)
    return [math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]
