"""The coefficients of one tensor: parameters, what they mean, and the gradient that reaches them.

With W = sum of c_i * W_i and G = dL/dW, dL/dc_i = R(G * W_i), where R sums over what a coefficient
covers. A tensor is looked at as a matrix of rows and columns (its last dimension); blocks of rows
are projected one after another, so that no second matrix of its size is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from merge_cli.checkpoint.coefficients import COLUMNS, ROWS
from merge_cli.recipe.training import Training

Kind = Literal["tensor", "column", "row", "element"]


@dataclass(frozen=True)
class CoefficientLayout:
    """How a tensor is cut into coefficients.

    Attributes:
        rows, columns: of the matrix that the tensor is looked at as.
        groups: matrices that lie below one another (the experts of a fused tensor); each has
            column coefficients of its own.
        rank: of the correction to the coefficients; 0 without one.
    """

    shape: tuple[int, ...]
    kind: Kind
    rows: int
    columns: int
    groups: int = 1
    rank: int = 0

    @property
    def inner(self) -> tuple[int, int]:
        """The shape of one source's coefficients, as a matrix."""
        return {
            "tensor": (1, 1),
            "column": (self.groups, self.columns),
            "row": (self.rows, 1),
            "element": (self.rows, self.columns),
        }[self.kind]

    @property
    def stored(self) -> tuple[int, ...]:
        """The same as it broadcasts against the tensor."""
        lead, ones = self.shape[:-1], (1,) * len(self.shape)
        return {
            "tensor": ones,
            "column": (*self.shape[:-2], 1, self.columns) if len(self.shape) > 1 else self.shape,
            "row": (*lead, 1),
            "element": self.shape,
        }[self.kind]

    @property
    def count(self) -> int:
        """Numbers that are learned for one source."""
        return math.prod(self.inner) + self.rank * (self.rows + self.columns)

    def add_up(self, matrix: Any, start: int, into: Any) -> None:
        """R: add the elements that each coefficient covers.

        Args:
            matrix: rows [start, start + n) of something of the tensor's shape.
            into: [*inner].
        """
        stop = start + len(matrix)
        if self.kind == "tensor":
            into[0, 0] += matrix.sum()
        elif self.kind == "row":
            into[start:stop, 0] += matrix.sum(1)
        elif self.kind == "element":
            into[start:stop] += matrix
        elif self.groups == 1:
            into[0] += matrix.sum(0)
        else:
            into.index_add_(0, self.groups_of(start, stop, matrix.device), matrix)

    def groups_of(self, start: int, stop: int, device: Any) -> Any:
        """The matrix that each row belongs to, where several lie below one another."""
        import torch

        return torch.arange(start, stop, device=device) // (self.rows // self.groups)


def layout_of(
    shape: Sequence[int], granularity: str, rank: int = 0, *, input_first: bool = False
) -> CoefficientLayout:
    """The layout of a tensor under a granularity.

    A vector (norm, bias) has a coefficient for each element, unless the tensor has only one.

    Args:
        input_first: the weight is stored as [in, out] (GPT-2's Conv1D), so that its input columns
            are its rows.
    """
    shape = tuple(shape) or (1,)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    groups = math.prod(shape[:-2])
    if granularity == "tensor":
        return CoefficientLayout(shape, "tensor", rows, columns)
    if len(shape) == 1:
        return CoefficientLayout(shape, "element", 1, columns)
    if granularity == "low_rank":
        kind: Kind = "row" if input_first else "column"
        return CoefficientLayout(shape, kind, rows, columns, groups, min(rank, rows, columns))
    if input_first and granularity in ("column", "row"):
        granularity = "row" if granularity == "column" else "column"
    kinds: dict[str, Kind] = {"column": "column", "row": "row", "element": "element"}
    return CoefficientLayout(shape, kinds[granularity], rows, columns, groups)


def starting_parameter(training: Training, sources: int) -> float:
    """Every coefficient's parameter before training, and before `start: best` is looked for.

    With `raw_soup` the parameter itself is 1/sources, as in the code of DAM's authors: behind their
    tanh the coefficients of three sources add up to 0.9645, and not to 1.
    """
    if training.activation == "softmax":
        return 0.0
    if training.start == "raw_soup":
        return 1.0 / sources
    if isinstance(training.start, float):
        value = training.start
    else:
        value = 0.3 if training.start == "task_arithmetic" else 1.0 / sources
    return _before_activation(value, training.activation)


class Coefficients:
    """All sources' coefficients of one tensor; float32, or float64 where the student is.

    Attributes:
        raw: parameters [sources, *layout.inner]; `values` is what the activation makes of them.
        left, right: [sources, rows, rank] and [sources, columns, rank]: factors of a correction
            that is added to the values without activation; None at rank 0.
    """

    def __init__(
        self,
        name: str,
        layout: CoefficientLayout,
        sources: int,
        training: Training,
        seed: int,
        device: Any = "cpu",
        dtype: Any = None,
    ) -> None:
        import torch

        self.name, self.layout, self.activation = name, layout, training.activation
        dtype = dtype or torch.float32
        raw = starting_parameter(training, sources)
        self.raw = torch.full((sources, *layout.inner), raw, dtype=dtype, device=device)
        self.left: Any = None
        self.right: Any = None
        if layout.rank:
            # One factor starts at 0, so that the correction does; the other must not.
            generator = torch.Generator().manual_seed(_seed(seed, name))
            shape = (sources, layout.columns, layout.rank)
            right = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.right = (right / math.sqrt(layout.rank)).to(device=device, dtype=dtype)
            self.left = torch.zeros(sources, layout.rows, layout.rank, dtype=dtype, device=device)
        self._values: Any = None
        self.value_grad = torch.zeros_like(self.raw)
        self.left_grad: Any = None if self.left is None else torch.zeros_like(self.left)
        self.right_grad: Any = None if self.right is None else torch.zeros_like(self.right)

    @property
    def parameters(self) -> list[Any]:
        """What the optimizer moves."""
        return [self.raw] if self.left is None else [self.raw, self.left, self.right]

    @property
    def projections(self) -> list[Any]:
        """What accumulates over the backward passes of a step: what processes must add up."""
        projections = [self.value_grad]
        return (
            projections
            if self.left_grad is None
            else [*projections, self.left_grad, self.right_grad]
        )

    @property
    def values(self) -> Any:
        """The coefficients [sources, *layout.inner], without the low-rank correction."""
        if self._values is None:
            self._values = _activated(self.raw, self.activation)
        return self._values

    def begin(self, weights: Sequence[float]) -> None:
        """Every coefficient of a source as its weight in a plain sum."""
        for i, weight in enumerate(weights):
            self.raw[i] = _before_activation(weight, self.activation)
        self.moved()

    def show(self, entries: Mapping[str, Any]) -> None:
        """Hold what a file of coefficients says, to be measured; training ends with it."""
        self._values = entries[self.name].to(self.raw).reshape(self.raw.shape)
        if self.left is not None:
            self.left.copy_(entries[self.name + ROWS])
            self.right.copy_(entries[self.name + COLUMNS])

    def moved(self) -> None:
        """The parameters have changed."""
        self._values = None

    def block(self, start: int, stop: int) -> Any:
        """The coefficients of rows [start, stop): [sources, rows or 1, columns or 1]."""
        result = self.values
        if self.layout.kind in ("row", "element"):
            result = result[:, start:stop]
        elif self.layout.kind == "column" and self.layout.groups > 1:
            result = result[:, self.layout.groups_of(start, stop, self.raw.device)]
        if self.left is not None:
            # Rank by rank, each product and sum rounded by itself: as the engine will do it.
            import torch

            shape = (len(result), stop - start, self.layout.columns)
            result = torch.broadcast_to(result, shape).clone()
            for r in range(self.layout.rank):
                result += self.left[:, start:stop, None, r] * self.right[:, None, :, r]
        return result

    def project(self, grad: Any, weights: Sequence[Any], start: int, scratch: Any = None) -> None:
        """Add R(G * W_i) for rows from `start` on.

        Args:
            grad: [rows, columns] of dL/dW, in the coefficients' dtype.
            weights: the same rows of every source.
            scratch: as large as `grad`, to be overwritten.
        """
        import torch

        stop = start + len(grad)
        for i, weight in enumerate(weights):
            product = torch.mul(grad, weight, out=scratch)
            if self.left is not None:
                self.left_grad[i, start:stop] += product @ self.right[i]
                self.right_grad[i] += product.T @ self.left[i, start:stop]
            self.layout.add_up(product, start, self.value_grad[i])

    def gradients(self, penalty_grad: Any = None, raw_penalty_grad: Any = None) -> list[Any]:
        """dL/d of each of `parameters`; the accumulated projections stay.

        Args:
            penalty_grad, raw_penalty_grad: of penalties on `values` and on `raw`, of their shape.
        """
        grad = self.value_grad if penalty_grad is None else self.value_grad + penalty_grad
        c = self.values
        if self.activation == "tanh":
            grad = grad * (1 - c * c)
        elif self.activation == "sigmoid":
            grad = grad * c * (1 - c)
        elif self.activation == "softmax":
            grad = c * (grad - (c * grad).sum(0, keepdim=True))
        if raw_penalty_grad is not None:
            grad = grad + raw_penalty_grad
        return [grad] if self.left_grad is None else [grad, self.left_grad, self.right_grad]

    def clear(self) -> None:
        """Forget the step's projections."""
        for projection in self.projections:
            projection.zero_()

    def entries(self) -> dict[str, Any]:
        """What a file of coefficients holds of this tensor: after the activation, float32."""
        import torch

        stored = self.values.reshape(len(self.raw), *self.layout.stored)
        named = {self.name: stored, self.name + ROWS: self.left, self.name + COLUMNS: self.right}
        return {
            name: value.detach().to("cpu", torch.float32).contiguous().clone()
            for name, value in named.items()
            if value is not None
        }


def _before_activation(start: float, activation: str) -> float:
    """The parameter whose activation is `start`.

    Raises:
        ValueError: there is none; recipes that ask for it are refused before.
    """
    if activation == "softmax":
        return 0.0
    least = {"tanh": -1.0, "sigmoid": 0.0}.get(activation)
    if least is None:
        return start
    if not least < start < 1:
        raise ValueError(f"{activation} does not reach {start:g}")
    return math.atanh(start) if activation == "tanh" else math.log(start / (1 - start))


def _activated(raw: Any, activation: str) -> Any:
    if activation == "softmax":
        return raw.softmax(0)
    return {"none": raw.clone, "tanh": raw.tanh, "sigmoid": raw.sigmoid}[activation]()


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "big")
