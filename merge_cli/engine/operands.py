"""From raw bytes to what methods see: flat, upcast blocks, task vectors subtracted once.

A tensor's bytes are either in memory already (a unit that was read ahead) or fetched block by
block (a tensor larger than a unit, which `prepare` and `survey` must see whole). Methods cannot
tell the difference, and the result does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.raw import FilePool, read_into
from merge_cli.engine.plan import TensorTask
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.methods.blocks import Block, Span

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CPU_RUNS = 4  # 256k elements: the operands of a few sources stay in L2
_GPU_BLOCK = 64 * BLOCK_MULTIPLE


@dataclass(frozen=True)
class Arithmetic:
    """Where and how a merge computes: what every block is made with.

    Attributes:
        needs_delta: the method's operands are task vectors.
    """

    device: torch.device
    seed: int
    needs_delta: bool
    allow_non_finite: bool = False

    def block_size(self, operands: int) -> int:
        """Elements in a block: fewer with many operands, always a multiple of BLOCK_MULTIPLE."""
        if self.device.type != "cpu":
            return _GPU_BLOCK
        return max(1, _CPU_RUNS // max(1, operands // 4)) * BLOCK_MULTIPLE


def read_span(files: FilePool, ref: TensorRef, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a tensor as raw bytes on the CPU."""
    import torch

    width = DTYPES[ref.dtype][0]
    raw = torch.empty((stop - start) * width, dtype=torch.uint8)
    if raw.numel():
        buffer = memoryview(raw.numpy().data)
        read_into(files, ref.path, ref.offset + start * width, buffer, ref.model)
    return raw


class TaskReader:
    """One tensor of every source as `TensorBlocks`, from `start` to `stop`.

    Args:
        loaded: raw bytes of every input (the base first) for exactly this range, or None to read
            from the files as blocks are asked for.
        on_pass: called at the start of each pass over the blocks.
    """

    def __init__(
        self,
        task: TensorTask,
        arithmetic: Arithmetic,
        files: FilePool,
        start: int = 0,
        stop: int | None = None,
        loaded: list[Tensor] | None = None,
        on_pass: Callable[[], None] | None = None,
    ) -> None:
        self.task, self.arithmetic = task, arithmetic
        self.name, self.parameters = task.name, task.parameters
        self.size = task.size
        self._start, self._stop = start, task.size if stop is None else stop
        self._files = files
        self._loaded = loaded
        self._on_pass = on_pass
        self.wide = any(ref.dtype == "F64" for ref in task.inputs)

    def blocks(self) -> Iterator[Block]:
        """Every block in order; may be called again and again."""
        if self._on_pass is not None:
            self._on_pass()
        step = self.arithmetic.block_size(len(self.task.operands))
        for start in range(self._start, self._stop, step):
            yield self.block(start, min(start + step, self._stop))

    def block(self, start: int, stop: int) -> Block:
        """Elements [start, stop) of every operand, upcast, on the computing device."""
        inputs = [self._upcast(i, start, stop) for i in range(len(self.task.inputs))]
        base = inputs.pop(0) if self.task.base is not None else None
        if base is not None and self.arithmetic.needs_delta:
            inputs = [operand - base for operand in inputs]
        at = Span(self.name, start, self.arithmetic.seed, self.task.ids)
        return Block(base, inputs, at)

    def _upcast(self, i: int, start: int, stop: int) -> Tensor:
        import torch

        ref = self.task.inputs[i]
        dtype = getattr(torch, DTYPES[ref.dtype][1])
        if self._loaded is None:
            raw = read_span(self._files, ref, start, stop).view(dtype)
        else:
            raw = self._loaded[i].view(dtype)[start - self._start : stop - self._start]
        wide = torch.float64 if self.wide else torch.float32
        return raw.to(self.arithmetic.device).to(wide)
