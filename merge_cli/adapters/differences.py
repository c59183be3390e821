"""What a fine-tune has changed: its numbers minus its base's."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from merge_cli.adapters.pair import ExpertMatrix
from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.non_finite import non_finite_error
from merge_cli.checkpoint.tensors import Read, Tensor, read_numbers
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.backend import host_backend
from merge_cli.kernels.convert import COMPILED, decode_rows
from merge_cli.kernels.matrices import sum_of_squares
from merge_cli.kernels.reduce import exact_sum
from merge_cli.planning.plan import TensorTask

_BLOCK = 2**17  # elements that are read at once: they stay in the cache


class ChangeReader:
    """Reads changes of one fine-tune; threads may share it.

    Each thread reads into the same memory again and again: fresh memory for each matrix would take
    the system longer to hand out than it takes to fill.
    """

    def __init__(self, read: Read) -> None:
        self._read, self._local = read, threading.local()

    def matrix(self, task: TensorTask) -> Any:
        """The change of a tensor: numpy float32 in its shape, until the thread's next call."""
        change = self._memory("change", task.size)
        self._fill(task, 0, change)
        return change.reshape(task.shape)

    def expert(self, expert: ExpertMatrix, tasks: Mapping[str, TensorTask]) -> Any:
        """The change of an expert's matrix: numpy float32 [outputs, inputs], as long."""
        import numpy as np

        width = tasks[expert.tensors[0]].shape[-1]
        heights = [tasks[name].shape[-2] for name in expert.tensors]
        change, begin = self._memory("change", sum(heights) * width), 0
        for name, height in zip(expert.tensors, heights, strict=True):
            size = height * width
            self._fill(tasks[name], (expert.index or 0) * size, change[begin : begin + size])
            begin += size
        matrix = change.reshape(-1, width)
        return np.ascontiguousarray(matrix.T) if expert.transposed else matrix

    def squares(self, task: TensorTask) -> float:
        """The sum of squares of a tensor's change, without making it."""
        sums, block = [], self._memory("change", min(_BLOCK, task.size))
        for start in range(0, task.size, _BLOCK):
            part = block[: task.size - start]
            self._fill(task, start, part)
            sums.append(sum_of_squares(part[None]))
        return exact_sum([sums])

    def _fill(self, task: TensorTask, start: int, out: Any) -> None:
        """Fill a flat array with the change from element `start` on.

        Raises:
            NonFiniteError: NaN or Inf among them.
        """
        tuned, base, finite = task.operands[0], task.base, True
        assert base is not None
        same = tuned.dtype == base.dtype and tuned.dtype in COMPILED
        decode = self._decode_both if same and host_backend() == "compiled" else self._subtract
        for begin in range(0, len(out), _BLOCK):
            finite &= decode(tuned, base, start + begin, out[begin : begin + _BLOCK])
        if not finite:
            raise self._not_finite(tuned, base, start, len(out))

    def _not_finite(self, tuned: Tensor, base: Tensor, start: int, count: int) -> NonFiniteError:
        """Which of the two has NaN or Inf among these elements."""
        import numpy as np

        hint = "Replace the file, or leave the tensor out with --exclude."
        for tensor in (tuned, base):
            marks = ~np.isfinite(read_numbers(self._read, tensor, start, count))
            if marks.any():
                element = start + int(marks.argmax())
                return non_finite_error(tensor, element, hint=hint, together=hint)
        message = "its change is too large for float32"
        return NonFiniteError(message, model=tuned.model, tensor=tuned.name, hint=hint)

    def _decode_both(self, tuned: Tensor, base: Tensor, start: int, out: Any) -> bool:
        """Fill `out` by one compiled loop over what is stored; whether all of it is finite."""
        import numpy as np

        size, width = len(out), width_of(tuned.dtype)
        raw = self._memory("stored", 2 * _BLOCK).view(np.uint8)[: 2 * size * width]
        rows = raw.reshape(2, size * width)
        for tensor, stored in zip((base, tuned), rows, strict=True):
            tensor.fill(self._read, start, stored.data)
        base_values = self._memory("base", _BLOCK)[:size]
        return decode_rows(rows, tuned.dtype, out[None], base_values, deltas=True)

    def _subtract(self, tuned: Tensor, base: Tensor, start: int, out: Any) -> bool:
        """As `_decode_both`, of tensors of any two dtypes."""
        import numpy as np

        numbers = read_numbers(self._read, tuned, start, len(out))
        np.subtract(numbers, read_numbers(self._read, base, start, len(out)), out=out)
        return bool(np.isfinite(out).all())

    def _memory(self, purpose: str, size: int) -> Any:
        """A flat float32 array of the calling thread, whose content is left over."""
        import numpy as np

        memory = getattr(self._local, purpose, None)
        if memory is None or len(memory) < size:
            memory = np.empty(size, np.float32)
            setattr(self._local, purpose, memory)
        return memory[:size]
