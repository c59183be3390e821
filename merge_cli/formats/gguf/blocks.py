"""The types of blocks in which ggml stores weights, and tensors of them as numbers.

What a block holds is in `block_decoders`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read
from merge_cli.formats.gguf import block_decoders as decoders
from merge_cli.kernels.backend import host_backend

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


F32 = BlockType(0, "F32", 1, 4, decoders.f32, "F32")
F16 = BlockType(1, "F16", 1, 2, decoders.half, "F16")
BF16 = BlockType(30, "BF16", 1, 2, decoders.bf16, "BF16")
Q8_0 = BlockType(8, "Q8_0", 32, 34, decoders.q8_0)
_TYPES = (
    F32,
    F16,
    BF16,
    Q8_0,
    BlockType(2, "Q4_0", 32, 18, decoders.q4_0),
    BlockType(3, "Q4_1", 32, 20, decoders.q4_1),
    BlockType(6, "Q5_0", 32, 22, decoders.q5_0),
    BlockType(7, "Q5_1", 32, 24, decoders.q5_1),
    BlockType(10, "Q2_K", 256, 84, decoders.q2_k),
    BlockType(11, "Q3_K", 256, 110, decoders.q3_k),
    BlockType(12, "Q4_K", 256, 144, decoders.q4_k),
    BlockType(13, "Q5_K", 256, 176, decoders.q5_k),
    BlockType(14, "Q6_K", 256, 210, decoders.q6_k),
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
