"""Numbers as the blocks of a GGUF file, rounded as ggml rounds them."""

from __future__ import annotations

from typing import Any

from merge_cli.formats.gguf.blocks import BF16, F16, F32, Q8_0, BlockType

KINDS: dict[str, BlockType] = {"F16": F16, "BF16": BF16, "Q8_0": Q8_0, "F32": F32}


def encode(numbers: Any, kind: BlockType) -> bytes:
    """Numbers as blocks.

    Args:
        numbers: numpy float32, flat, of whole blocks.
        kind: one of `KINDS`.
    """
    import numpy as np

    if kind is F32:
        return bytes(numbers.tobytes())
    if kind is F16:
        with np.errstate(over="ignore"):  # what is too large is Inf, which the caller refuses
            return bytes(numbers.astype(np.float16).tobytes())
    if kind is BF16:
        bits = numbers.view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))  # to even
        return bytes((rounded >> 16).astype(np.uint16).tobytes())
    assert kind is Q8_0, "KINDS has no other"
    blocks = numbers.reshape(-1, kind.elements)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    whole = np.floor(np.abs(scaled))
    codes = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))  # halves go outward
    raw = np.empty((len(blocks), kind.nbytes), np.uint8)
    raw[:, :2] = scale.astype(np.float16).view(np.uint8)
    raw[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return bytes(raw.tobytes())
