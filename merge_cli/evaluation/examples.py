"""Token sequences of which a part counts, and the batches that they go through a model in."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """Tokens of an example; `first` is the first that counts, never 0."""

    ids: array[int]
    first: int

    @property
    def counted(self) -> int:
        """Tokens whose prediction counts."""
        return len(self.ids) - self.first


def micro_batches(
    numbers: Sequence[int], sequences: Sequence[Example], tokens: int
) -> list[list[int]]:
    """Numbers of sequences in groups of at most `tokens` with padding, the longest first."""
    found: list[list[int]] = []
    for number in sorted(numbers, key=lambda i: (-len(sequences[i].ids), i)):
        width = len(sequences[found[-1][0]].ids) if found else 0
        if not found or width * (len(found[-1]) + 1) > tokens:
            found.append([])
        found[-1].append(number)
    return found


def padded(examples: Sequence[Example]) -> tuple[Any, Any, Any]:
    """ids and mask, int64 [rows, length], and where a prediction counts, bool [rows, length].

    Padding is on the right: with causal attention nothing that counts sees it. The prediction of
    token i is made at i - 1.
    """
    import torch

    width = max(len(one.ids) for one in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    counted = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, one in enumerate(examples):
        ids[i, : len(one.ids)] = torch.tensor(one.ids)
        mask[i, : len(one.ids)] = 1
        counted[i, one.first - 1 : len(one.ids) - 1] = True
    return ids, mask, counted
