"""Experts are merged by number: whether models number them alike, told by their routers.

A router has a row for each expert. Fine-tunes of one model keep rows near those of the same
number; where a row is nearest to another number's, the experts behind them were probably permuted
or trained apart, and an average by number mixes different things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.header import MERGEABLE
from merge_cli.checkpoint.stored import read_numbers, reading
from merge_cli.checkpoint.tensors import Read, Tensor

# `mlp.gate.weight`, `block_sparse_moe.gate.weight`, `mlp.router.weight`: and not `gate_proj`.
_ROUTER = re.compile(r"(^|\.)(gate|router|router\.layer|gate\.wg|router\.classifier)\.weight$")
_MOST = 4096  # experts: a matrix with more rows is no router


@dataclass(frozen=True)
class RouterDifference:
    """A model's routers against the reference's.

    Attributes:
        rows: experts in all routers that were compared.
        elsewhere: of these, rows that are nearest to a row of another number.
        example: a router with the most of them.
    """

    model: str
    rows: int
    elsewhere: int
    example: str


def compare_routers(
    names: Sequence[str], models: Sequence[Mapping[str, Tensor]]
) -> tuple[RouterDifference, ...]:
    """Every model's routers against the first one's; empty for models without experts.

    Args:
        names: of the models.
        models: their tensors; only routers are read.
    """
    with reading() as read:
        routers = [name for name, ref in models[0].items() if _is_router(name, ref)]
        found = []
        for label, tensors in zip(names[1:], models[1:], strict=True):
            counts = list(_elsewhere(routers, models[0], tensors, read))
            if counts:
                rows, away = sum(count[1] for count in counts), sum(count[2] for count in counts)
                worst, *_ = max(counts, key=lambda count: count[2])
                found.append(RouterDifference(label, rows, away, worst))
    return tuple(found)


def _is_router(name: str, ref: Tensor) -> bool:
    shape = ref.shape
    small = len(shape) == 2 and 1 < shape[0] <= min(_MOST, shape[1])
    return small and bool(_ROUTER.search(name)) and ref.dtype in MERGEABLE


def _elsewhere(
    routers: Sequence[str],
    first: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    read: Read,
) -> Iterator[tuple[str, int, int]]:
    """For each router its experts, and how many are nearest to another number."""
    import numpy as np

    for name in routers:
        if name not in other or other[name].shape != first[name].shape:
            continue
        rows = []
        for tensor in (first[name], other[name]):
            values = read_numbers(read, tensor, 0, tensor.size).reshape(tensor.shape)
            values = values.astype(np.float64)
            lengths = np.linalg.norm(values, axis=1, keepdims=True)
            rows.append(values / np.where(lengths > 0, lengths, 1.0))
        nearest = (rows[1] @ rows[0].T).argmax(1)
        away = int((nearest != np.arange(len(nearest))).sum())
        yield name, len(nearest), away
