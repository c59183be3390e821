"""Floats of eight and four bits as tables, and scales of any dtype as float32.

E4M3 and E5M2: Micikevicius et al., arXiv:2209.05433. E2M1 and E8M0: Open Compute Project,
Microscaling Formats (MX) Specification 1.0; Rouhani et al., arXiv:2310.10537.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, read_numbers
from merge_cli.kernels.codes import look_up

# Exponent bits, fraction bits and bias; the sign comes before them.
_LAYOUTS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F4_E2M1": (2, 1, 1)}


@cache
def numbers_of(dtype: str) -> Any:
    """Every number of a small format by its code: numpy float32 [256], of E2M1 [16].

    Args:
        dtype: F8_E4M3, F8_E5M2, F8_E8M0 (exponents alone) or F4_E2M1.
    """
    import numpy as np

    if dtype == "F8_E8M0":
        exponents = np.ldexp(np.float32(1), np.arange(255) - 127)
        return np.append(exponents, np.float32("nan"))
    exponent_bits, fraction_bits, bias = _LAYOUTS[dtype]
    sign_bit = exponent_bits + fraction_bits
    result = np.empty(2 << sign_bit, np.float32)
    for code in range(len(result)):
        sign = -1.0 if code >> sign_bit else 1.0
        magnitude = code & ((1 << sign_bit) - 1)
        exponent, fraction = divmod(magnitude, 1 << fraction_bits)
        if exponent:
            value = (1 + fraction / (1 << fraction_bits)) * 2.0 ** (exponent - bias)
        else:
            value = fraction / (1 << fraction_bits) * 2.0 ** (1 - bias)
        if dtype == "F8_E4M3" and magnitude == 0x7F:
            value = float("nan")
        if dtype == "F8_E5M2" and exponent == 31:
            value = float("nan") if fraction else float("inf")
        result[code] = sign * value
    return result


@cache
def _pairs() -> Any:
    """The two E2M1 numbers of a byte, the lower four bits first: numpy uint64 [256]."""
    import numpy as np

    single = numbers_of("F4_E2M1")
    codes = np.arange(256)
    return np.stack([single[codes & 15], single[codes >> 4]], axis=1).view(np.uint64).reshape(-1)


def fp4_numbers(raw: Any) -> Any:
    """E2M1 numbers of packed bytes: numpy uint8 [..., n] -> float32 [..., 2 n]."""
    import numpy as np

    return look_up(_pairs(), raw).view(np.float32)


def read_scales(read: Read, ref: TensorRef, start: int, count: int) -> Any:
    """Scales [start, start + count) of a tensor: numpy float32, flat.

    Bytes (U8) are exponents, as E8M0 is stored where safetensors does not know it.
    """
    import numpy as np

    dtype = "F8_E8M0" if ref.dtype == "U8" else ref.dtype
    if not dtype.startswith("F8"):
        return read_numbers(read, ref, start, count)
    raw = np.empty(count, np.uint8)
    read(ref, start, raw.data)
    return look_up(numbers_of(dtype), raw)
