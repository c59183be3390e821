"""Changes of modules multiplied out once, for all passes of a method over them.

A method that trims reads a tensor several times, and a change that is a product of factors would be
multiplied anew each time. So its numbers wait in memory until the module is merged.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor
from merge_cli.lora.changes import LowRank
from merge_cli.planning.plan import TensorTask

_BLOCK = 2**17  # elements that are multiplied at once: they stay in the cache


class ChangeCache:
    """The numbers of changes; threads may share it.

    Args:
        room: bytes. Where it is full, the change that waits longest goes, and is computed again if
            it is read again: a method that reads the whole model first does that.
    """

    def __init__(self, room: int) -> None:
        self._room, self._entries = room, OrderedDict[int, _Entry]()
        self._lock = threading.Lock()

    def wrapped(self, tasks: Sequence[TensorTask]) -> tuple[TensorTask, ...]:
        """The same tasks, their changes read from here; of those that are larger, as they are."""
        return tuple(
            task._replace(operands=tuple(map(self._wrapped, task.operands)))
            if sum(tensor.nbytes for tensor in task.operands) <= self._room
            else task
            for task in tasks
        )

    def _wrapped(self, tensor: Tensor) -> Tensor:
        return KeptChange(tensor, self) if isinstance(tensor, LowRank) else tensor

    def numbers(self, change: Tensor, read: Read) -> memoryview:
        """All numbers of a change, float32 as bytes."""
        with self._lock:
            entry = self._entries.setdefault(id(change), _Entry())
            self._entries.move_to_end(id(change))
        with entry.lock:  # the first thread computes, and the others wait for it
            numbers = entry.numbers
            if numbers is None:
                numbers = entry.numbers = _computed(change, read)
        with self._lock:
            while sum(e.nbytes for e in self._entries.values()) > self._room:
                self._entries.popitem(last=False)
        return numbers

    def drop(self, task: TensorTask) -> None:
        """Forget the changes of a module that is merged."""
        with self._lock:
            for operand in task.operands:
                if isinstance(operand, KeptChange):
                    self._entries.pop(id(operand.change), None)


@dataclass(eq=False)
class _Entry:
    lock: Any = field(default_factory=threading.Lock)
    numbers: memoryview | None = None

    @property
    def nbytes(self) -> int:
        numbers = self.numbers
        return 0 if numbers is None else numbers.nbytes


@dataclass(frozen=True)
class KeptChange(Float32):
    """A change whose numbers are read from a cache. See `tensors.Tensor`."""

    change: Tensor
    cache: ChangeCache = field(repr=False)

    is_update = True

    @property
    def made_of(self) -> Tensor:
        return self.change

    @property
    def default_dtype(self) -> str:
        return self.change.default_dtype

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.change.stored

    @property
    def formula(self) -> str:
        return self.change.formula

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        buffer[:] = self.cache.numbers(self.change, read)[4 * start : 4 * start + len(buffer)]


def _computed(change: Tensor, read: Read) -> memoryview:
    numbers = memoryview(bytearray(4 * change.size))
    for begin in range(0, len(numbers), 4 * _BLOCK):
        change.fill(read, begin // 4, numbers[begin : begin + 4 * _BLOCK])
    return numbers
