"""How one output tensor is stored in few bits: which tensors hold it, and how values become bytes.

A merge hands over float32 values from the first element to the last, in pieces. An `Encoding` says
how many of them belong together (`tile`), which stored tensors they end in (`parts`), and fills in
the bytes. A scale is computed from the merge's float32, rounded once to its dtype, and codes are
computed with the rounded scale; nothing is rounded twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.layout import OutputTensor
from merge_cli.checkpoint.tensors import Float32, Tensor


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight.

    Attributes:
        suffix: what its name has behind that of the weight; of the module with `of_module`.
        elements, width: so many elements of the weight, from a multiple of them on, take so many
            bytes here. The last ones may be fewer.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    width: int
    of_module: bool = False

    def output(self, name: str) -> OutputTensor:
        """The tensor, for a weight of this name."""
        stem = name.removesuffix(".weight") if self.of_module else name
        return OutputTensor(stem + self.suffix, self.dtype, self.shape)

    def bytes_of(self, start: int, stop: int) -> tuple[int, int]:
        """Where the bytes of elements [start, stop) begin and end."""
        return start // self.elements * self.width, -(-stop // self.elements) * self.width


@dataclass(frozen=True)
class Tiles:
    """Merged values that are encoded together, one tile or several.

    Attributes:
        values: numpy float32, flat.
        shape: of the weight.
        at: of the first value, from where the bytes begin that are filled in.
        scale: of the whole tensor, as `Encoding.tensor_scale` says.
        before: numpy float32 like `values`: what is stored already in the bytes that are filled
            in. Groups that are still the same numbers are left as they are. None for nothing.
    """

    values: Any
    shape: tuple[int, ...]
    at: int = 0
    scale: float = 1.0
    before: Any = None


class Encoding(ABC):
    """A way to store a weight. A frozen dataclass with what tells it from others of its kind."""

    @property
    @abstractmethod
    def family(self) -> str:
        """Encodings that one config.json can describe together."""

    @property
    def whole(self) -> bool:
        """Whether a scale is of the whole tensor, whose largest magnitude must be known first."""
        return False

    @property
    @abstractmethod
    def label(self) -> str:
        """What plans and reports call it."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What shares a scale, for the plan: `a scale for each row`."""

    @property
    def only_stacks(self) -> bool:
        """Whether linear layers beside stacks of experts stay in their dtype."""
        return False

    def unfit(self, shape: tuple[int, ...]) -> str:
        """Why a weight of this shape cannot be stored so; empty where it can."""
        return "" if len(shape) == 2 else "only matrices are written in it"

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored tensors, the codes first."""

    @abstractmethod
    def tile(self, shape: tuple[int, ...]) -> int:
        """Elements that are encoded together; the last ones of a tensor may be fewer."""

    def span(self, shape: tuple[int, ...]) -> int:
        """Elements whose bytes lie together in every part: a multiple of the tile."""
        return self.tile(shape)

    def tensor_scale(self, largest: float, stored: Sequence[Any]) -> float:
        """The scale of the whole tensor, where there is one.

        Args:
            largest: the largest finite magnitude.
            stored: bytes of the parts of a tensor whose blocks are to be kept; empty without one.
                Its scale is taken where it will do, or no block could be kept.
        """
        return 1.0

    @abstractmethod
    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        """Fill in the bytes of whole tiles.

        Args:
            stored: for each part numpy uint8, flat: of these tiles, or of the span that they are
                in. A number for all elements is always there.
        """

    @abstractmethod
    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        """`quantization_config` of a model.

        Args:
            groups: encodings of this family, and the modules that are stored so.
            unconverted: modules that stay in their dtype.
        """


@runtime_checkable
class Encoded(Protocol):
    """A tensor that is computed from codes, and knows how it is stored."""

    @property
    def encoding(self) -> Encoding | str:
        """How to store it again, or why that is not done."""


@dataclass(frozen=True)
class Verbatim(Encoding):
    """The stored tensors of a weight as they are, whatever they mean."""

    refs: tuple[TensorRef, ...]
    name: str  # of the weight that they are

    @property
    def family(self) -> str:
        return "as stored"

    @property
    def label(self) -> str:
        return self.refs[0].dtype

    @property
    def described(self) -> str:
        return "byte for byte"

    def unfit(self, shape: tuple[int, ...]) -> str:
        return ""

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        size = max(1, _size(shape))
        stem = self.name.removesuffix(".weight")
        return tuple(
            Part(ref.name.removeprefix(stem), ref.dtype, ref.shape, size, ref.nbytes, True)
            for ref in self.refs
        )

    def tile(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        raise AssertionError("bytes that are copied are not encoded")

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        raise AssertionError("the config of what is copied is copied, too")


def encoded_part(tensor: Tensor) -> Encoded | None:
    """The codes that a tensor is computed from, element by element; None where it has none.

    An adapter's update is looked through: the weight below it is stored in codes, in that order.
    """
    while not isinstance(tensor, Encoded):
        if not isinstance(tensor, Float32):
            return None
        tensor = tensor.made_of
    return tensor


def stored_parts(
    encoding: Encoding, name: str, shape: tuple[int, ...], tensor: Tensor
) -> tuple[TensorRef, ...]:
    """The stored tensors that are the parts of an encoding, in their order.

    Args:
        tensor: computed from them.

    Returns:
        none where they are not the same tensors in the same dtypes.
    """
    by_name = {ref.name: ref for ref in tensor.stored}
    refs = []
    for part in encoding.parts(shape):
        output = part.output(name)
        ref = by_name.get(output.name)
        if ref is None or (ref.dtype, ref.shape) != (output.dtype, output.shape):
            return ()
        refs.append(ref)
    return tuple(refs)


def rounded_scales(scales: Any, dtype: str) -> tuple[Any, Any]:
    """Scales in their dtype, of which none becomes nought.

    Args:
        scales: numpy float32, above zero.
        dtype: F32, BF16 or F16.

    Returns:
        as of `rounded`.
    """
    import numpy as np

    # float16's smallest number is 2^-24.
    return rounded(np.maximum(scales, np.float32(2.0**-24)) if dtype == "F16" else scales, dtype)


def rounded(numbers: Any, dtype: str) -> tuple[Any, Any]:
    """Numbers in a dtype.

    Args:
        numbers: numpy float32.
        dtype: F32, BF16 or F16.

    Returns:
        their bytes (numpy uint8, flat), and as numpy float32.
    """
    import numpy as np

    if dtype == "F32":
        return numbers.view(np.uint8).reshape(-1), numbers
    if dtype == "F16":
        half = numbers.astype(np.float16)
        return half.view(np.uint8).reshape(-1), half.astype(np.float32)
    bits = numbers.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nearest = np.where(np.isnan(numbers), np.uint16(0x7FC0), nearest)
    wide = (nearest.astype(np.uint32) << 16).view(np.float32)
    return nearest.view(np.uint8).reshape(-1), wide


def changed_groups(values: Any, before: Any) -> Any:
    """Which groups are other numbers than before: indexes, or all of them.

    Args:
        values: numpy float32 [groups, size].
        before: the same, flat; None for nothing.
    """
    import numpy as np

    if before is None:
        return slice(None)
    return np.flatnonzero((values != before.reshape(values.shape)).any(axis=1))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
