"""What blocks of ggml stand for, in plain numpy: each decoder says in which order the bytes lie.

A block is 32 or 256 consecutive elements of a row: codes of a few bits, and scales that they
share. Q4_0 is `scale * (code - 8)`, Q4_1 `scale * code + least`. A K-quant has 256 elements in
parts of 16 or 32, and the scales of the parts are codes themselves. The layouts are those of
ggml-common.h.

Each takes uint8 [blocks, bytes of a block] and gives float32 [blocks, elements of a block].
Everything is computed in float32, in the order in which ggml does: scale first, then code, then
what is added. So the numbers are the same to the bit. `kernels.compiled.blocks` has the loops that
are compared with these.
"""

from __future__ import annotations

from typing import Any

from merge_cli.kernels.codes import spread


def _cut(raw: Any, *lengths: int) -> list[Any]:
    """The fields of blocks, each [blocks, its bytes] and contiguous."""
    import numpy as np

    assert sum(lengths) == raw.shape[1]
    ends = np.cumsum(lengths)[:-1]
    return [np.ascontiguousarray(field) for field in np.split(raw, ends, axis=1)]


def half(field: Any) -> Any:
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


def q4_0(raw: Any) -> Any:
    """Scale (f16), 16 bytes of codes."""
    scale, codes = _cut(raw, 2, 16)
    return _scaled(spread(codes, 4, 16), 8, half(scale))


def q4_1(raw: Any) -> Any:
    """Scale and least number (f16), 16 bytes of codes."""
    scale, least, codes = _cut(raw, 2, 2, 16)
    return _scaled(spread(codes, 4, 16), 0, half(scale), -half(least))


def q5_0(raw: Any) -> Any:
    """Scale (f16), the fifth bits, 16 bytes of codes."""
    scale, fifth, codes = _cut(raw, 2, 4, 16)
    return _scaled(spread(codes, 4, 16) | spread(fifth, 1) << 4, 16, half(scale))


def q5_1(raw: Any) -> Any:
    """Scale and least number (f16), the fifth bits, 16 bytes of codes."""
    scale, least, fifth, codes = _cut(raw, 2, 2, 4, 16)
    complete = spread(codes, 4, 16) | spread(fifth, 1) << 4
    return _scaled(complete, 0, half(scale), -half(least))


def q8_0(raw: Any) -> Any:
    """Scale (f16), 32 signed bytes."""
    scale, codes = _cut(raw, 2, 32)
    return _scaled(codes ^ 128, 128, half(scale))


def q2_k(raw: Any) -> Any:
    """16 bytes of scales and least numbers, 4 bits each; codes of 2 bits; two f16 for those."""
    both, codes, scale, least = _cut(raw, 16, 64, 2, 2)
    scales = half(scale) * _floats(both & 15)
    leasts = half(least) * _floats(both >> 4)
    return _scaled(spread(codes, 2, 32), 0, scales, leasts)


def q3_k(raw: Any) -> Any:
    """The third bits, codes of 2 bits, 16 scales of 6 bits, and a f16 for those.

    A third bit that is not set takes 4 off. Of the scales' 12 bytes, eight have the lower four bits
    of two scales each, and four the upper two of four.
    """
    import numpy as np

    third, codes, packed, scale = _cut(raw, 32, 64, 12, 2)
    lower, upper = _cut(packed, 8, 4)
    signed = (spread(lower, 4, 8) | spread(upper, 2, 4) << 4).view(np.int8) - np.int8(32)
    complete = spread(codes, 2, 32) | spread(third, 1, 32) << 2
    return _scaled(complete, 4, half(scale) * _floats(signed))


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


def q4_k(raw: Any) -> Any:
    """Two f16 for 8 scales and 8 least numbers, those in 12 bytes, codes of 4 bits."""
    scale, least, packed, codes = _cut(raw, 2, 2, 12, 128)
    scales, leasts = _scales_and_leasts(packed)
    return _scaled(spread(codes, 4, 32), 0, half(scale) * scales, half(least) * leasts)


def q5_k(raw: Any) -> Any:
    """As Q4_K, with the fifth bits between scales and codes."""
    scale, least, packed, fifth, codes = _cut(raw, 2, 2, 12, 32, 128)
    scales, leasts = _scales_and_leasts(packed)
    complete = spread(codes, 4, 32) | spread(fifth, 1, 32) << 4
    return _scaled(complete, 0, half(scale) * scales, half(least) * leasts)


def q6_k(raw: Any) -> Any:
    """The lower four bits of the codes, the upper two, 16 signed scales, and a f16 for those."""
    import numpy as np

    lower, upper, signed, scale = _cut(raw, 128, 64, 16, 2)
    scales = half(scale) * _floats(signed.view(np.int8))
    return _scaled(spread(lower, 4, 64) | spread(upper, 2, 32) << 4, 32, scales)


def f32(raw: Any) -> Any:
    import numpy as np

    return raw.view(np.float32)


def bf16(raw: Any) -> Any:
    """The upper half of a float32."""
    import numpy as np

    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
