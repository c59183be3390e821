"""Blocks of GGUF files against loops over single elements, and the gguf package."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import reading
from merge_cli.formats.gguf.blocks import BLOCK_TYPES, DequantizedBlocks

QUANTISED = {kind.name: kind for kind in BLOCK_TYPES.values() if not kind.dtype}


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def simple(block: bytes, bits: int, with_least: bool) -> list[float]:
    """Q4_0, Q4_1, Q5_0 and Q5_1: 32 elements, the first sixteen in the lower halves of bytes."""
    scale, rest = half(block[:2]), block[2:]
    least = half(rest[:2]) if with_least else 0.0
    rest = rest[2:] if with_least else rest
    fifth = int.from_bytes(rest[:4], "little") if bits == 5 else 0
    codes = rest[4:] if bits == 5 else rest
    out = []
    for i in range(32):
        code = codes[i % 16] >> (4 if i >= 16 else 0) & 15 | (fifth >> i & 1) << 4
        out.append(scale * code + least if with_least else scale * (code - (1 << (bits - 1))))
    return out


def q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * signed(byte) for byte in block[2:]]


def q2_k(block: bytes) -> list[float]:
    scale, least = half(block[80:82]), half(block[82:84])
    out = []
    for i in range(256):
        both = block[i // 16]
        code = block[16 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        out.append(scale * (both & 15) * code - least * (both >> 4))
    return out


def q3_k(block: bytes) -> list[float]:
    third, codes, packed = block[:32], block[32:96], block[96:108]
    scale = half(block[108:])
    out = []
    for i in range(256):
        part = i // 16
        lower = packed[part % 8] >> (4 if part >= 8 else 0) & 15
        upper = packed[8 + part % 4] >> 2 * (part // 4) & 3
        code = codes[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        is_set = third[i % 32] >> (i // 32) & 1
        out.append(scale * ((lower | upper << 4) - 32) * (code - (0 if is_set else 4)))
    return out


def scale_and_least(packed: bytes, part: int) -> tuple[int, int]:
    if part < 4:
        return packed[part] & 63, packed[part + 4] & 63
    rest = packed[part + 4]
    return rest & 15 | packed[part - 4] >> 6 << 4, rest >> 4 | packed[part] >> 6 << 4


def q45_k(block: bytes, bits: int) -> list[float]:
    scale, least, packed = half(block[:2]), half(block[2:4]), block[4:16]
    fifth = block[16:48] if bits == 5 else bytes(32)
    codes = block[48:] if bits == 5 else block[16:]
    out = []
    for i in range(256):
        part = i // 32
        code = codes[i // 64 * 32 + i % 32] >> (4 if part % 2 else 0) & 15
        code |= (fifth[i % 32] >> part & 1) << 4
        own_scale, own_least = scale_and_least(packed, part)
        out.append(scale * own_scale * code - least * own_least)
    return out


def q6_k(block: bytes) -> list[float]:
    lower, upper, scales, scale = block[:128], block[128:192], block[192:208], half(block[208:])
    out = []
    for i in range(256):
        inside = i % 128
        low = lower[i // 128 * 64 + inside % 64] >> (4 if inside >= 64 else 0) & 15
        high = upper[i // 128 * 32 + i % 32] >> 2 * (inside // 32) & 3
        out.append(scale * signed(scales[i // 16]) * ((low | high << 4) - 32))
    return out


ORACLES: dict[str, Callable[[bytes], list[float]]] = {
    "Q4_0": lambda block: simple(block, 4, False),
    "Q4_1": lambda block: simple(block, 4, True),
    "Q5_0": lambda block: simple(block, 5, False),
    "Q5_1": lambda block: simple(block, 5, True),
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": lambda block: q45_k(block, 4),
    "Q5_K": lambda block: q45_k(block, 5),
    "Q6_K": q6_k,
}


def random_blocks(name: str, count: int, seed: int = 0) -> Any:
    """Blocks of any bytes, with finite scales."""
    kind = QUANTISED[name]
    raw = np.random.default_rng(seed).integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    with_least = (0, 2) if name.endswith("_1") else (0,)
    for at in scales.get(name, with_least):
        raw[:, at + 1] &= 0xBF  # the exponent's highest bit: below 2
    return raw


def decoded(name: str, raw: np.ndarray) -> np.ndarray:
    """Numbers of blocks; compiled and plain decoders give the same bits."""
    numbers = np.full((len(raw), QUANTISED[name].elements), np.nan, np.float32)
    QUANTISED[name].decode(raw, numbers)
    assert numbers.tobytes() == QUANTISED[name].plain(raw).astype(np.float32).tobytes()
    return numbers


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_every_code_against_loops(name: str) -> None:
    assert sorted(ORACLES) == sorted(QUANTISED)
    raw = random_blocks(name, 50)
    numbers = decoded(name, raw)
    expected = np.array([ORACLES[name](bytes(block)) for block in raw])
    assert numbers.shape == expected.shape == (50, QUANTISED[name].elements)
    # Of two products and a difference in float32.
    bound = 4 * np.finfo(np.float32).eps * (np.abs(expected).max(axis=1, keepdims=True) + 1)
    assert (np.abs(numbers - expected) <= bound).all()


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_the_same_bits_as_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = random_blocks(name, 500, seed=1)
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (QUANTISED[name].elements, QUANTISED[name].nbytes)
    assert kind.value == QUANTISED[name].number
    expected = gguf.quants.dequantize(raw, kind)
    assert decoded(name, raw).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "F16", "BF16", "F32"])
def test_any_span_is_the_same(tmp_path: Path, name: str) -> None:
    kind = next(kind for kind in BLOCK_TYPES.values() if kind.name == name)
    count = 200_000 // kind.elements
    raw = np.random.default_rng(3).normal(0, 1, count).astype(np.float32)
    content = {
        "F32": raw.tobytes(),
        "F16": raw.astype(np.float16).tobytes(),
        "BF16": raw.view(np.uint16)[1::2].tobytes(),
    }.get(name) or random_blocks(name, count).tobytes()
    file = tmp_path / "blocks"
    file.write_bytes(b"before" + content)
    ref = TensorRef("w", file, "U8", (len(content),), 6, len(content))
    shape = (count * kind.elements // 64, 64)
    tensor = DequantizedBlocks(ref, kind.number, shape, "BF16")
    assert tensor.size == math.prod(shape)
    whole = np.empty(tensor.size, np.float32)
    parts = np.empty(tensor.size, np.float32)
    generator, start = np.random.default_rng(0), 0
    with reading() as read:
        tensor.fill(read, 0, whole.view(np.uint8).data)
        while start < tensor.size:
            stop = min(tensor.size, start + int(generator.integers(1, 90_000)))
            tensor.fill(read, start, parts[start:stop].view(np.uint8).data)
            start = stop
    assert whole.tobytes() == parts.tobytes()
    assert np.isfinite(whole).all()
    assert whole.std() > 0
