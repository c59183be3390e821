"""One method over dicts of tensors, each tensor block by block as the engine shows files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from merge_cli.checkpoint.dtypes import MERGEABLE, promoted, torch_dtype
from merge_cli.checkpoint.layout import natural_key
from merge_cli.checkpoint.statistics import TensorStatistics
from merge_cli.engine.dict_tensors import StateDict, dtype_name, same_memory
from merge_cli.engine.operands import ModelReader, operands_of, sample_ranges
from merge_cli.engine.worker_context import all_finite
from merge_cli.errors import NonFiniteError, UsageError
from merge_cli.kernels.convert import encode
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.methods.blocks import Block, Span
from merge_cli.methods.method import Method
from merge_cli.planning.resolve import Resolver, arguments

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_CPU_BLOCK, _DEVICE_BLOCK = 4 * BLOCK_MULTIPLE, 64 * BLOCK_MULTIPLE


@dataclass(frozen=True)
class StateDictMerger:
    """One method over dicts that fit one another.

    Attributes:
        operands: the dicts in the formula's order.
        base: where the formula has one.
        at: seed and places of the operands, for random masks.
        dtype: safetensors' name of the result's; None keeps each tensor's own.
    """

    method: Method
    resolver: Resolver
    operands: Sequence[StateDict]
    base: StateDict | None
    at: Span
    dtype: str | None
    allow_non_finite: bool

    def merge(self, reference: StateDict, given: Sequence[StateDict]) -> dict[str, torch.Tensor]:
        """Every tensor of the reference, in its order."""
        result: dict[str, torch.Tensor] = {}
        first: dict[object, str] = {}
        readers: list[_TensorReader] = []
        for name, tensor in reference.items():
            original = first.setdefault(same_memory(name, given), name)
            if original == name and self._merged(name) and tensor.numel():
                readers.append(self._reader(name))
        prepared = None
        if self.method.model_pass is not None and readers:
            # In the order of a plan: of equal magnitudes, the first one is kept.
            readers.sort(key=lambda reader: natural_key(reader.name))
            prepared = self.method.model_pass(ModelReader(readers, _in_order, lambda: None))
        merged = {reader.name: reader for reader in readers}
        for name, tensor in reference.items():
            original = first[same_memory(name, given)]
            if original != name:
                result[name] = result[original]
            elif name in merged:
                result[name] = self._tensor(merged[name], prepared)
            else:
                kind = torch_dtype(self.dtype) if self.dtype and self._merged(name) else None
                result[name] = tensor.detach().to(kind or tensor.dtype, copy=True)
        return result

    def _merged(self, name: str) -> bool:
        inputs = [*self.operands, self.base] if self.base is not None else self.operands
        return all(dtype_name(tensors[name]) in MERGEABLE for tensors in inputs)

    def _reader(self, name: str) -> _TensorReader:
        resolved = self.resolver.of(name, 0.0)
        if resolved.error:
            raise UsageError(resolved.error)
        base = self.base[name] if self.base is not None else None
        return _TensorReader(
            name,
            [tensors[name] for tensors in self.operands],
            base,
            resolved.parameters,
            self.at,
            deltas="deltas" in self.method.supplied,
        )

    def _tensor(self, reader: _TensorReader, model_pass: Any) -> torch.Tensor:
        import torch

        kinds = {dtype_name(tensor) for tensor in reader.inputs}
        dtype = self.dtype or (promoted(kinds) if len(kinds) > 1 else kinds.pop())
        out = torch.empty(reader.size, dtype=torch_dtype(dtype), device=reader.device)
        supplied = arguments(self.method, reader.parameters)
        if self.method.tensor_pass is not None:
            supplied["prepared"] = self.method.tensor_pass(reader, model_pass, **reader.parameters)
        supplied = {
            name: value
            for name, value in supplied.items()
            if name != "prepared" or name in self.method.supplied
        }
        for block in reader.blocks():
            if not (block.finite or self.allow_non_finite):
                message = "NaN or Inf among the weights"
                raise NonFiniteError(message, tensor=reader.name, hint="Or allow_non_finite=True.")
            values = self.method.function(**operands_of(block, self.method.supplied), **supplied)
            rounded, fits = encode(values, dtype)
            if not fits and block.finite and not self.allow_non_finite:
                message = "some merged weights are too large for float16"
                raise NonFiniteError(message, tensor=reader.name, hint="Give another dtype.")
            out[block.at.start : block.at.start + len(rounded)] = rounded
        return out.view(reader.shape)


def _in_order(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [work(item) for item in items]


class _TensorReader:
    """One tensor of every dict as `methods.blocks.TensorBlocks`."""

    statistics: TensorStatistics | None = None

    def __init__(
        self,
        name: str,
        operands: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        parameters: Mapping[str, Any],
        at: Span,
        *,
        deltas: bool,
    ) -> None:
        self.name, self.parameters, self._at, self._deltas = name, parameters, at, deltas
        self._base = base
        self.inputs = [*operands] if base is None else [base, *operands]
        first = self.inputs[0]
        self.shape: tuple[int, ...] = tuple(first.shape)
        self.size, self.device = first.numel(), first.device
        self.wide = any(dtype_name(tensor) == "F64" for tensor in self.inputs)
        self._step = _CPU_BLOCK if self.device.type == "cpu" else _DEVICE_BLOCK
        self.starts: Sequence[int] = [*range(0, self.size, self._step), self.size]
        self._flat = [tensor.detach().reshape(-1) for tensor in self.inputs]

    def blocks(self) -> Iterator[Block]:
        return self.range(0, self.size)

    def range(self, start: int, stop: int) -> Iterator[Block]:
        """Elements [start, stop) in blocks."""
        for begin in range(start, stop, self._step):
            yield self._block(begin, min(begin + self._step, stop))

    def span(self, number: int) -> Iterator[Block]:
        """The blocks of one span."""
        return self.range(self.starts[number], self.starts[number + 1])

    def map(self, work: Callable[[Iterator[Block]], T], only: int | None = None) -> list[T]:
        numbers = range(len(self.starts) - 1) if only is None else [only]
        return [work(self.span(number)) for number in numbers]

    def sample(self, count: int) -> Iterator[Block]:
        if self.size <= count:
            yield from self.blocks()
            return
        for start, stop in sample_ranges(self.size, count):
            yield from self.range(start, stop)

    def _block(self, start: int, stop: int) -> Block:
        import torch

        kind = torch.float64 if self.wide else torch.float32
        arrays = [flat[start:stop].to(self.device, kind, copy=True) for flat in self._flat]
        finite = all_finite(arrays)
        base = arrays.pop(0) if self._base is not None else None
        if base is not None and self._deltas:
            arrays = [array.sub_(base) for array in arrays]
        at = Span(self.name, start, self._at.seed, self._at.sources)
        return Block(base, arrays, at, finite)
