"""The student: one ordinary model whose parameters hold the merged weights.

Coefficients are not in its graph. When a parameter's gradient is complete, a hook projects it onto
the sources' weights and drops it; so memory holds one model, its activations and one gradient.

    fused      the hook of a step's last backward pass also moves the coefficients and rewrites the
               parameter, with the same read of the sources
    two-pass   hooks only project; then all gradients are at hand (to be clipped, or added up over
               processes), and parameters are rewritten in a second read

A parameter is rewritten in place while the backward pass still runs below it. That is safe because
its own gradient comes last, and autograd itself would refuse to use a weight that has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.tensors import Tensor
from merge_cli.dam.coefficients import Coefficients
from merge_cli.dam.losses import penalty
from merge_cli.dam.optimizers import CoefficientOptimizer
from merge_cli.dam.sources import Sources
from merge_cli.engine.parameter_slices import ParameterSlice

_HELD_BYTES = 1 << 26  # rows that are kept from the projection for the rewrite

Reduce = Callable[[Sequence[Any]], None]  # adds tensors up over all processes, in place


@dataclass(frozen=True)
class MergedParameter(ParameterSlice):
    """A parameter of the student, or a part of one, what it is made of, and whether its
    coefficients are learned."""

    name: str = ""
    trained: bool = False


class Student:
    """Merged weights, projections, updates.

    Args:
        net: any causal language model of transformers.
        merged_parameters: every parameter that is merged, by its parts if it is stored in several.
        coefficients: by name, for every merged parameter.
        form: soup or task_vector.
        penalize: what penalties are taken of: coefficients, or parameters.

    Attributes:
        steps: optimizer steps so far.
    """

    def __init__(
        self,
        net: Any,
        merged_parameters: Sequence[MergedParameter],
        coefficients: Mapping[str, Coefficients],
        sources: Sources,
        *,
        form: str,
        optimizer: CoefficientOptimizer | None = None,
        penalties: Mapping[str, float] | None = None,
        penalize: str = "coefficients",
    ) -> None:
        self.net, self.sources, self.coefficients = net, sources, coefficients
        self.merged_parameters = {merged.name: merged for merged in merged_parameters}
        self.trained = [merged.name for merged in merged_parameters if merged.trained]
        self.steps = 0
        self.grad_scale = 1.0
        self.penalties_found: dict[str, float] = {}
        self._form, self._optimizer = form, optimizer
        self._penalties, self._penalize = penalties or {}, penalize
        self._rate: float | None = None  # set while the last backward of a fused step runs
        self._moved: set[str] = set()
        self._order: list[str] = []
        self._buffer: Any = None
        self._hooks = []
        for parts in _by_parameter(merged_parameters):
            parameter = parts[0].parameter
            trained = [merged for merged in parts if merged.trained]
            parameter.requires_grad_(bool(trained))
            if trained:
                hook = self._hook(trained)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.sources.close()

    def moments(self, name: str) -> list[tuple[Any, Any]]:
        """The optimizer's state of a tensor, for checkpoints."""
        assert self._optimizer is not None, "a student that is only measured has no moments"
        return self._optimizer.moments(name, self.coefficients[name].parameters)

    def write_all(self) -> None:
        """Every parameter from its coefficients."""
        for name in self.merged_parameters:
            self._write(name, None)

    def write_mixture(self, base: float, weights: Sequence[float]) -> None:
        """Every parameter as base * theta_0 + sum of weights * theta_i: a baseline to measure."""
        for name in self.merged_parameters:
            matrix, blocks = self._matrix(name), self._blocks(name)
            for start, stop in blocks:
                total = None
                if base:
                    total = self.sources.base_rows(name, start, stop) * base
                for weight, rows in zip(weights, self.sources.rows(name, start, stop), strict=True):
                    if weight:
                        total = rows * weight if total is None else total + rows * weight
                matrix[start:stop] = 0 if total is None else total.to(matrix.dtype)

    def write_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Every parameter as a merge has it that is stored: a baseline to measure."""
        for name in self.merged_parameters:
            matrix = self._matrix(name)
            for start, stop in self._blocks(name):
                matrix[start:stop] = self.sources.stored_rows(name, tensors[name], start, stop)

    def last_backward(self, loss: Any, rate: float) -> None:
        """The last backward pass of a fused step: coefficients and parameters move inside it."""
        self._rate = rate
        self.penalties_found = {}
        try:
            loss.backward()
        finally:
            self._rate = None
        for name in self.trained:  # whatever this pass did not reach: experts without a token
            if name not in self._moved:
                self._move(name, rate, [])
        self._moved.clear()
        self.steps += 1

    def update(self, rate: float, clip: float | None = None, reduce: Reduce | None = None) -> float:
        """The second half of a two-pass step.

        Args:
            clip: largest norm of all gradients together.
            reduce: adds projections up over processes.

        Returns:
            the norm before clipping; not finite where a gradient overflowed: then nothing moved.
        """
        if reduce is not None:
            reduce([p for name in self.trained for p in self.coefficients[name].projections])
        self.penalties_found = {}
        grads = {name: self._gradients(name) for name in self.trained}
        norm = math.sqrt(sum(float((g * g).sum()) for grad in grads.values() for g in grad))
        if math.isfinite(norm):
            factor = min(1.0, clip / norm) if clip is not None and norm > 0 else 1.0
            for name, projected in grads.items():
                self._step(name, [g * factor for g in projected] if factor < 1 else projected, rate)
                self._write(name, None)
            self.steps += 1
        for name in self.trained:
            self.coefficients[name].clear()
        return norm

    def _hook(self, merged_parameters: Sequence[MergedParameter]) -> Callable[[Any], None]:
        def arrived(parameter: Any) -> None:
            grad, parameter.grad = parameter.grad, None
            for merged in merged_parameters:
                held = self._project(merged.name, grad[merged.index])
                if merged is merged_parameters[-1]:
                    del grad
                if self._rate is not None:
                    self._move(merged.name, self._rate, held)

        return arrived

    def _project(self, name: str, grad: Any) -> list[Any]:
        """R(G * W_i) into the coefficients' gradients; the rows that were read, if they are few."""
        coefficients = self.coefficients[name]
        layout, dtype = coefficients.layout, coefficients.raw.dtype
        matrix = grad.reshape(layout.rows, layout.columns)
        keep = self._rate is not None and self._bytes(name) <= _HELD_BYTES
        self._foresee(name)
        held = []
        for start, stop in self._blocks(name):
            read = self._read(name, start, stop)
            rows = matrix[start:stop].to(dtype)
            if self.grad_scale != 1:
                rows = rows / self.grad_scale
            coefficients.project(rows, read[1], start, self._scratch(rows))
            if keep:
                held.append(read)
        return held

    def _move(self, name: str, rate: float, held: list[Any]) -> None:
        self._step(name, self._gradients(name), rate)
        self._write(name, held or None)
        self.coefficients[name].clear()
        self._moved.add(name)

    def _gradients(self, name: str) -> list[Any]:
        coefficients, raw = self.coefficients[name], self._penalize == "parameters"
        terms, grad = penalty(coefficients.raw if raw else coefficients.values, self._penalties)
        for term, value in terms.items():
            self.penalties_found[term] = self.penalties_found.get(term, 0.0) + value
        return coefficients.gradients(None, grad) if raw else coefficients.gradients(grad)

    def _step(self, name: str, grads: Sequence[Any], rate: float) -> None:
        assert self._optimizer is not None, "a student that is only measured takes no steps"
        coefficients = self.coefficients[name]
        self._optimizer.move(name, coefficients.parameters, grads, rate, self.steps + 1)
        coefficients.moved()

    def _write(self, name: str, held: list[Any] | None) -> None:
        """A parameter from its coefficients: in float32 (or wider), rounded once."""
        import torch

        matrix, coefficients = self._matrix(name), self.coefficients[name]
        for number, (start, stop) in enumerate(self._blocks(name)):
            base, rows = held[number] if held else self._read(name, start, stop)
            block = coefficients.block(start, stop)
            total = rows[0] * block[0]
            for i, row in enumerate(rows[1:], start=1):
                total.add_(torch.mul(row, block[i], out=self._scratch(row)))
            target = matrix[start:stop]
            if base is None:
                target.copy_(total)  # rounds, where the student is narrower
            elif target.dtype == total.dtype:
                torch.add(base, total, out=target)
            else:
                target.copy_(torch.add(base, total, out=total))

    def _scratch(self, like: Any) -> Any:
        """Memory for a product that is added up at once; a new one each time costs page faults."""
        if self._buffer is None or self._buffer.numel() < like.numel():
            self._buffer = like.new_empty(like.numel())
        return self._buffer[: like.numel()].view_as(like)

    def _read(self, name: str, start: int, stop: int) -> tuple[Any, list[Any]]:
        if self._form == "task_vector":
            return self.sources.deltas(name, start, stop)
        return None, self.sources.rows(name, start, stop)

    def _matrix(self, name: str) -> Any:
        layout = self.coefficients[name].layout
        return self.merged_parameters[name].values.view(layout.rows, layout.columns)

    def _blocks(self, name: str) -> list[tuple[int, int]]:
        rows, step = self.coefficients[name].layout.rows, self.sources.block_rows(name)
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _bytes(self, name: str) -> int:
        coefficients = self.coefficients[name]
        return (
            coefficients.layout.rows
            * coefficients.layout.columns
            * len(coefficients.raw)
            * (coefficients.raw.element_size())
        )

    def _foresee(self, name: str) -> None:
        """Gradients come in the same order in every pass: ask for the next tensor's sources."""
        if name not in self._order:
            self._order.append(name)
        elif len(self._order) > 1:
            following = self._order[(self._order.index(name) + 1) % len(self._order)]
            self.sources.expect(following)


def _by_parameter(merged_parameters: Sequence[MergedParameter]) -> list[list[MergedParameter]]:
    """Parts of one parameter share its gradient."""
    groups: dict[int, list[MergedParameter]] = {}
    for merged in merged_parameters:
        groups.setdefault(id(merged.parameter), []).append(merged)
    return list(groups.values())
