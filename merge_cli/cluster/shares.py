"""Dealing a merge: which chunks the next free node gets.

A share is a run of whole tensors in the plan's order, which is nearly the order of the files, so
that a node reads and writes long stretches. A tensor larger than a share is dealt by chunks. Shares
shrink with what is left: the first ones are large, the last ones small, so that fast and slow nodes
end together. What a lost node has not finished goes back and is dealt again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.planning.chunks import Chunk
from merge_cli.planning.plan import TensorTask

LEAST_BYTES = 256 * 2**20  # some seconds of a node's work: many times what a share costs to deal


class Shares:
    """The chunks that nobody has yet.

    Args:
        chunks: of these tasks, what is left to merge.
        least: bytes that a share has at least, where so much is left.
    """

    def __init__(
        self, tasks: Sequence[TensorTask], chunks: Iterable[Chunk], least: int = LEAST_BYTES
    ) -> None:
        self._width = [
            width_of(task.dtype) + sum(width_of(tensor.dtype) for tensor in task.inputs)
            for task in tasks
        ]
        self.least = least
        self._waiting = sorted(chunks, key=lambda chunk: chunk.number)
        self.bytes = sum(map(self.bytes_of, self._waiting))

    def __bool__(self) -> bool:
        """Whether anything is left to deal."""
        return bool(self._waiting)

    def bytes_of(self, chunk: Chunk) -> int:
        """What is read and written for a chunk."""
        return (chunk.stop - chunk.start) * self._width[chunk.task]

    def take(self, part: float) -> list[Chunk]:
        """A share of about this part of what is left; empty where nothing is."""
        room = max(self.least, part * self.bytes)
        share: list[Chunk] = []
        for _, group in groupby(self._waiting, key=lambda chunk: chunk.task):
            tensor = list(group)
            size = sum(map(self.bytes_of, tensor))
            if size <= room:
                share += tensor
                room -= size
                continue
            if not share:  # larger than a whole share: its chunks, and at least one
                while tensor and (not share or self.bytes_of(tensor[0]) <= room):
                    room -= self.bytes_of(tensor[0])
                    share.append(tensor.pop(0))
            break
        del self._waiting[: len(share)]
        self.bytes -= sum(map(self.bytes_of, share))
        return share

    def give_back(self, chunks: Iterable[Chunk]) -> None:
        """Deal these again: who had them is lost."""
        returned = list(chunks)
        self._waiting = sorted([*self._waiting, *returned], key=lambda chunk: chunk.number)
        self.bytes += sum(map(self.bytes_of, returned))
