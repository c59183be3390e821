"""What methods see of the outside: where a span stands, and readers for those that look twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Which elements a method is looking at: `start` onward in the flat tensor called `name`.

    Attributes:
        sources: each source's place in the recipe. Slices may use any subset, and a random mask
            belongs to the source, not to its place in the slice.
    """

    name: str = ""
    start: int = 0
    seed: int = 0
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """One span of every operand of one tensor, upcast and flat. `base` is None without a base."""

    base: Tensor | None
    operands: list[Tensor]
    at: Span


class TensorBlocks(Protocol):
    """One tensor of every source, readable in blocks as often as needed.

    Attributes:
        name: its name in the output.
        size: its number of elements.
        wide: whether its blocks are float64 (a source is) rather than float32.
        parameters: the method's parameters as resolved for this tensor.
    """

    name: str
    size: int
    wide: bool
    parameters: Mapping[str, Any]

    def blocks(self) -> Iterator[Block]: ...
