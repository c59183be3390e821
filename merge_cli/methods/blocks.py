"""What a method sees of the engine: spans, blocks, and readers for passes over tensors and models.

And which sources a formula runs over (`operand_specs`): those that are listed, and the base's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from merge_cli.checkpoint.statistics import TensorStatistics
from merge_cli.kernels.backend import Array, joined
from merge_cli.kernels.fused import StoredBlock
from merge_cli.methods.method import Method
from merge_cli.recipe.schema import Parameters, Recipe, SliceSpec, SourceSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Which elements a method is looking at: `start` onward in the flat tensor called `name`.

    Attributes:
        sources: each source's index in the recipe. Slices may use any subset, and a random mask
            belongs to the source, not to its index in the slice.
    """

    name: str = ""
    start: int = 0
    seed: int = 0
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """One span of every operand of one tensor, upcast and flat.

    Attributes:
        base: None without a base.
        finite: whether every stored value is a finite number.
    """

    base: Array | None
    operands: list[Array]
    at: Span
    finite: bool = True


class Blocks(Protocol):
    """Every source's elements, readable as often as needed, by several threads at once.

    Attributes:
        size: elements of each source.
        starts: the flat index at which each span begins, and `size` at the end. Spans are whole
            numbers of `kernels.reduce.BLOCK_MULTIPLE` elements, except the last of a tensor, and
            the same on every machine.
    """

    @property
    def size(self) -> int: ...

    @property
    def starts(self) -> Sequence[int]: ...

    def map(self, work: Callable[[Iterator[Block]], T], only: int | None = None) -> list[T]:
        """work(blocks of a span, in order), for every span or one; results in the spans' order.

        Idle threads share the spans, so `work` must not write to anything that it shares.
        """

    def sample(self, count: int) -> Iterator[Block]:
        """Small blocks of about `count` elements in all, evenly spread; all, in order, if few."""


class TensorBlocks(Blocks, Protocol):
    """One tensor of every source.

    Blocks must not be changed: a small tensor's is handed out again instead of being read again.

    Attributes:
        name, shape: in the output. Blocks are flat; a row is the last dimension.
        wide: whether its blocks are float64 (a source is) rather than float32.
        parameters: the method's parameters as resolved for this tensor.
        statistics: what was gathered of it in every source, for a method that asks for that.
    """

    name: str
    shape: tuple[int, ...]
    wide: bool
    parameters: Mapping[str, Any]
    statistics: TensorStatistics | None

    def blocks(self) -> Iterator[Block]:
        """Every block in order, read by the calling thread alone."""


def map_stored(
    blocks: Blocks, work: Callable[[Iterable[StoredBlock]], T], only: int | None = None
) -> list[T] | None:
    """work(a span's blocks as they are stored) for every span or one, in a compiled loop each.

    None where the blocks do not lie in the host's memory as bfloat16, float16 or float32: then
    `blocks.map` gives them decoded.
    """
    stored = getattr(blocks, "map_stored", None)  # the engine's readers alone have it
    return None if stored is None else stored(work, only)


def _operands(block: Block) -> list[Array]:
    return block.operands


@dataclass(frozen=True)
class RowStream:
    """Blocks as `kernels.select` reads them: arrays of equal length, made of each block's.

    Attributes:
        rows: what is ranked; by default the operands.
    """

    blocks: Blocks
    rows: Callable[[Block], list[Array]] = _operands

    @property
    def size(self) -> int:
        return self.blocks.size

    @property
    def starts(self) -> Sequence[int]:
        return self.blocks.starts

    def map_stored(
        self, work: Callable[[Iterable[StoredBlock]], T], only: int | None = None
    ) -> list[T] | None:
        return map_stored(self.blocks, work, only) if self.rows is _operands else None

    def sample_keys(self, count: int) -> Any:
        sample = getattr(self.blocks, "sample_keys", None)  # likewise
        return sample(count) if sample is not None and self.rows is _operands else None

    def sample(self, count: int) -> Iterator[list[Array]]:
        return map(self.rows, self.blocks.sample(count))

    def map(self, work: Callable[[Iterator[list[Array]]], T], only: int | None = None) -> list[T]:
        return self.blocks.map(lambda blocks: work(map(self.rows, blocks)), only)


def load_whole(tensor: TensorBlocks) -> tuple[Array | None, list[Array]]:
    """The whole tensor of the base and of every source, in its shape.

    For methods whose formula needs it, which say so with `extra_memory`: memory then grows with the
    largest tensor.
    """
    bases, operands = [], []
    for block in tensor.blocks():
        bases.append(block.base)
        operands.append(block.operands)
    parts = [joined([*column], tensor.shape) for column in zip(*operands, strict=True)]
    return (None if bases[0] is None else joined([*bases], tensor.shape)), parts


class ModelBlocks(Blocks, Protocol):
    """Every tensor that is merged, one after another in the plan's order, as one stream.

    A block's `at` says which tensor it is of, and where in that tensor it begins.
    """

    tensors: Sequence[TensorBlocks]


def operand_specs(
    recipe: Recipe,
    method: Method,
    specs: Sequence[SourceSpec],
    output_slice: SliceSpec | None = None,
) -> tuple[SourceSpec, ...]:
    """The sources that the formula runs over, in its order.

    A base among the sources has no task vector, so methods on deltas leave it out; where the base
    is an operand of its own (slerp), it comes first. Methods that average models average an
    unlisted base, too, as mergekit does.

    Args:
        output_slice: the slice or module that lists the sources, if one does.
    """
    base = recipe.base_model
    if base is None:
        return tuple(specs)
    if averages_base(recipe, method, specs, output_slice):
        return (*specs, SourceSpec(base, "base_model"))
    base_specs = tuple(s for s in specs if s.model == base)
    others = tuple(s for s in specs if s.model != base)
    if method.base_is_source:
        return (base_specs or (SourceSpec(base, "base_model"),)) + others
    return others if method.needs_base else tuple(specs)


def shared_parameters(recipe: Recipe, output_slice: SliceSpec | None) -> list[Parameters]:
    """What stands for all sources of a piece, the closest first."""
    closest = [output_slice.parameters, output_slice.outer] if output_slice else []
    return [*closest, recipe.parameters]


def averages_base(
    recipe: Recipe, method: Method, specs: Sequence[SourceSpec], output_slice: SliceSpec | None
) -> bool:
    """Whether a base that is not listed counts as one more model."""
    if method.averages_base is None or lists_base(recipe, specs):
        return False
    return method.averages_base(recipe, shared_parameters(recipe, output_slice))


def lists_base(recipe: Recipe, specs: Sequence[SourceSpec]) -> bool:
    """Whether the base is among the sources, or cannot be: a slice has those that it lists."""
    return any(spec.model == recipe.base_model or spec.layer_range for spec in specs)
