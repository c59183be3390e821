"""Blocks of weights as ggml lays them out, and the numbers that they stand for.

A block is 32 or 256 consecutive elements of a row: codes of a few bits, and scales that they
share. Q4_0 is `scale * (code - 8)`, Q4_1 `scale * code + least`. A K-quant has 256 elements in
parts of 16 or 32, and the scales of the parts are codes themselves. The layouts are those of
ggml-common.h; each decoder's docstring gives the order of a block's bytes.

Everything is computed in float32, in the order in which ggml does: scale first, then code, then
what is added. So the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read
from merge_cli.kernels.backend import host_backend
from merge_cli.kernels.codes import spread

_AT_ONCE = 2**18  # elements: what is held besides the result is less than that

# uint8 [blocks, bytes of a block] -> float32 [blocks, elements of a block]
Decode = Callable[[Any], Any]


class BlockType(NamedTuple):
    """One way to store numbers.

    Attributes:
        number: what the file calls it.
        elements, nbytes: of a block.
        plain: numbers of blocks in numpy: what a compiled decoder is compared with.
        dtype: safetensors' name where a block is one float; empty otherwise.
    """

    number: int
    name: str
    elements: int
    nbytes: int
    plain: Decode
    dtype: str = ""

    def decode(self, raw: Any, out: Any) -> None:
        """The numbers of blocks.

        Args:
            raw: numpy uint8 [blocks, bytes of a block].
            out: numpy float32 [blocks, elements of a block], filled.
        """
        if self.dtype or host_backend() == "numpy":
            out[:] = self.plain(raw)
            return
        from merge_cli.kernels import compiled

        getattr(compiled, self.name.lower())(raw, out)


@dataclass(frozen=True)
class DequantizedBlocks:
    """A tensor in blocks, as float32. See `tensors.Tensor`.

    Attributes:
        blocks: the bytes, as a tensor of U8.
        number: the type of its blocks.
        shape: of its numbers.
        default_dtype: what the model's weights would be without quantisation.
    """

    blocks: TensorRef
    number: int
    shape: tuple[int, ...]
    default_dtype: str

    @property
    def name(self) -> str:
        return self.blocks.name

    @property
    def model(self) -> str:
        return self.blocks.model

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def size(self) -> int:
        kind = BLOCK_TYPES[self.number]
        return self.blocks.nbytes // kind.nbytes * kind.elements

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.blocks,)

    @property
    def formula(self) -> str:
        return f"numbers of {BLOCK_TYPES[self.number].name} blocks"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """Whole blocks are decoded, of which the buffer gets its part."""
        import numpy as np

        kind = BLOCK_TYPES[self.number]
        out = np.frombuffer(buffer, np.float32)
        for low in range(0, len(out), _AT_ONCE):
            part = out[low : low + _AT_ONCE]
            begin = start + low
            first, last = begin // kind.elements, -(-(begin + len(part)) // kind.elements)
            raw = np.empty((last - first, kind.nbytes), np.uint8)
            read(self.blocks, first * kind.nbytes, raw.reshape(-1).data)
            inside = begin - first * kind.elements
            is_whole = len(part) == (last - first) * kind.elements
            numbers = part if is_whole else np.empty((last - first) * kind.elements, np.float32)
            with np.errstate(invalid="ignore", over="ignore"):  # the engine stops at NaN and Inf
                kind.decode(raw, numbers.reshape(-1, kind.elements))
            if not is_whole:
                part[:] = numbers[inside:][: len(part)]


def _cut(raw: Any, *lengths: int) -> list[Any]:
    """The fields of blocks, each [blocks, its bytes] and contiguous."""
    import numpy as np

    assert sum(lengths) == raw.shape[1]
    ends = np.cumsum(lengths)[:-1]
    return [np.ascontiguousarray(field) for field in np.split(raw, ends, axis=1)]


def _half(field: Any) -> Any:
    """Two bytes as a float16: float32 [blocks, 1]."""
    import numpy as np

    return field.view(np.float16).astype(np.float32)


def _floats(codes: Any) -> Any:
    import numpy as np

    return codes.astype(np.float32)


def _scaled(codes: Any, offset: int, scales: Any, leasts: Any = None) -> Any:
    """scale * (code - offset) - least, by parts of blocks.

    Args:
        codes: numpy uint8 [blocks, codes of a block].
        scales, leasts: numpy float32 [blocks, parts]; parts are of one length. No leasts: 0.

    Returns:
        numpy float32 like the codes.
    """
    import numpy as np

    numbers = codes.astype(np.float32) - np.float32(offset)
    parts = scales[:, :, None] * numbers.reshape(*scales.shape, -1)
    if leasts is not None:
        parts -= leasts[:, :, None]
    return parts.reshape(codes.shape)


def _q4_0(raw: Any) -> Any:
    """Scale (f16), 16 bytes of codes."""
    scale, codes = _cut(raw, 2, 16)
    return _scaled(spread(codes, 4, 16), 8, _half(scale))


def _q4_1(raw: Any) -> Any:
    """Scale and least number (f16), 16 bytes of codes."""
    scale, least, codes = _cut(raw, 2, 2, 16)
    return _scaled(spread(codes, 4, 16), 0, _half(scale), -_half(least))


def _q5_0(raw: Any) -> Any:
    """Scale (f16), the fifth bits, 16 bytes of codes."""
    scale, fifth, codes = _cut(raw, 2, 4, 16)
    return _scaled(spread(codes, 4, 16) | spread(fifth, 1) << 4, 16, _half(scale))


def _q5_1(raw: Any) -> Any:
    """Scale and least number (f16), the fifth bits, 16 bytes of codes."""
    scale, least, fifth, codes = _cut(raw, 2, 2, 4, 16)
    complete = spread(codes, 4, 16) | spread(fifth, 1) << 4
    return _scaled(complete, 0, _half(scale), -_half(least))


def _q8_0(raw: Any) -> Any:
    """Scale (f16), 32 signed bytes."""
    scale, codes = _cut(raw, 2, 32)
    return _scaled(codes ^ 128, 128, _half(scale))


def _q2_k(raw: Any) -> Any:
    """16 bytes of scales and least numbers, 4 bits each; codes of 2 bits; two f16 for those."""
    both, codes, scale, least = _cut(raw, 16, 64, 2, 2)
    scales = _half(scale) * _floats(both & 15)
    leasts = _half(least) * _floats(both >> 4)
    return _scaled(spread(codes, 2, 32), 0, scales, leasts)


def _q3_k(raw: Any) -> Any:
    """The third bits, codes of 2 bits, 16 scales of 6 bits, and a f16 for those.

    A third bit that is not set takes 4 off. Of the scales' 12 bytes, eight have the lower four bits
    of two scales each, and four the upper two of four.
    """
    import numpy as np

    third, codes, packed, scale = _cut(raw, 32, 64, 12, 2)
    lower, upper = _cut(packed, 8, 4)
    signed = (spread(lower, 4, 8) | spread(upper, 2, 4) << 4).view(np.int8) - np.int8(32)
    complete = spread(codes, 2, 32) | spread(third, 1, 32) << 2
    return _scaled(complete, 4, _half(scale) * _floats(signed))


def _scales_and_leasts(packed: Any) -> tuple[Any, Any]:
    """Eight scales and eight least numbers of 6 bits each, packed into 12 bytes.

    Bytes 0-3 have the first four scales, 4-7 the first four least numbers, and in the two bits
    above them the upper bits of the other four, whose lower four bits are in bytes 8-11.
    """
    import numpy as np

    scale, least, rest = _cut(packed, 4, 4, 4)
    scales = np.concatenate([scale & 63, rest & 15 | scale >> 6 << 4], axis=1)
    leasts = np.concatenate([least & 63, rest >> 4 | least >> 6 << 4], axis=1)
    return _floats(scales), _floats(leasts)


def _q4_k(raw: Any) -> Any:
    """Two f16 for 8 scales and 8 least numbers, those in 12 bytes, codes of 4 bits."""
    scale, least, packed, codes = _cut(raw, 2, 2, 12, 128)
    scales, leasts = _scales_and_leasts(packed)
    return _scaled(spread(codes, 4, 32), 0, _half(scale) * scales, _half(least) * leasts)


def _q5_k(raw: Any) -> Any:
    """As Q4_K, with the fifth bits between scales and codes."""
    scale, least, packed, fifth, codes = _cut(raw, 2, 2, 12, 32, 128)
    scales, leasts = _scales_and_leasts(packed)
    complete = spread(codes, 4, 32) | spread(fifth, 1, 32) << 4
    return _scaled(complete, 0, _half(scale) * scales, _half(least) * leasts)


def _q6_k(raw: Any) -> Any:
    """The lower four bits of the codes, the upper two, 16 signed scales, and a f16 for those."""
    import numpy as np

    lower, upper, signed, scale = _cut(raw, 128, 64, 16, 2)
    scales = _half(scale) * _floats(signed.view(np.int8))
    return _scaled(spread(lower, 4, 64) | spread(upper, 2, 32) << 4, 32, scales)


def _f32(raw: Any) -> Any:
    import numpy as np

    return raw.view(np.float32)


def _bf16(raw: Any) -> Any:
    """The upper half of a float32."""
    import numpy as np

    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


F32 = BlockType(0, "F32", 1, 4, _f32, "F32")
F16 = BlockType(1, "F16", 1, 2, _half, "F16")
BF16 = BlockType(30, "BF16", 1, 2, _bf16, "BF16")
Q8_0 = BlockType(8, "Q8_0", 32, 34, _q8_0)
_TYPES = (
    F32,
    F16,
    BF16,
    Q8_0,
    BlockType(2, "Q4_0", 32, 18, _q4_0),
    BlockType(3, "Q4_1", 32, 20, _q4_1),
    BlockType(6, "Q5_0", 32, 22, _q5_0),
    BlockType(7, "Q5_1", 32, 24, _q5_1),
    BlockType(10, "Q2_K", 256, 84, _q2_k),
    BlockType(11, "Q3_K", 256, 110, _q3_k),
    BlockType(12, "Q4_K", 256, 144, _q4_k),
    BlockType(13, "Q5_K", 256, 176, _q5_k),
    BlockType(14, "Q6_K", 256, 210, _q6_k),
)
BLOCK_TYPES = {kind.number: kind for kind in _TYPES}
# Those that are not read, for the message.
NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
