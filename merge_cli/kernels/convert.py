"""Between storage formats and what is computed with: upcast once, round once.

The numpy half runs compiled and knows float32, bfloat16 and float16; the torch half knows float64
too. Rounding is to nearest, ties to even; a NaN is written as the format's plain quiet NaN.
Codes of fewer bits with scales are in kernels/quantise.py.
"""

from __future__ import annotations

from typing import Any

from merge_cli.checkpoint.dtypes import torch_dtype
from merge_cli.kernels.backend import Array

COMPILED = frozenset(("F32", "BF16", "F16"))


def decode_rows(raw: Any, dtype: str, rows: Any, base: Any, *, deltas: bool) -> bool:
    """Stored bytes (inputs, bytes) to float32, for inputs of one format.

    Args:
        rows: (sources, elements), filled.
        base: filled from the first input; None if there is no base among them.
        deltas: subtract the base from the sources.

    Returns:
        whether every stored value is finite.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    has_base = base is not None
    if dtype == "BF16":
        first_target = base if has_base else rows[0]
        return not compiled.decode_bf16(raw.view(np.uint16), rows, first_target, has_base, deltas)
    finite = True
    targets = [base, *rows] if has_base else list(rows)
    for stored, target in zip(raw, targets, strict=True):
        finite &= decode_row(stored, dtype, target)
    if deltas:
        np.subtract(rows, base, out=rows)
    return finite


def decode_row(raw: Any, dtype: str, out: Any) -> bool:
    """Stored bytes of one input to float32; whether every stored value is finite.

    Args:
        raw: numpy uint8; of F32 perhaps the bytes of `out` themselves.
        out: numpy float32, filled.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    if dtype == "BF16":
        halves = raw.view(np.uint16)[None]
        return not compiled.decode_bf16(halves, out[None], out, False, False)
    if dtype == "F16":
        return not compiled.decode_f16(raw.view(np.uint16), out)
    if not np.may_share_memory(raw, out):
        out[:] = raw.view(np.float32)
    return not compiled.non_finite(out)


def encode_into(values: Any, dtype: str, out: Any) -> bool:
    """float32 to stored bytes in `out` (numpy uint8).

    Returns:
        whether all of them fit: False if a float16 came out infinite.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    if dtype == "BF16":
        compiled.encode_bf16(values, out.view(np.uint16))
    elif dtype == "F16":
        return not compiled.encode_f16(values, out.view(np.uint16))
    else:
        out.view(np.float32)[:] = values
    return True


def decode(raw: Array, dtype: str, *, wide: bool) -> Array:
    """Stored bytes (torch uint8) to a new float32 tensor; float64 if `wide`."""
    import torch

    stored = raw.view(torch_dtype(dtype))
    return stored.to(torch.float64 if wide else torch.float32, copy=True)


def encode(values: Array, dtype: str) -> tuple[Array, bool]:
    """A tensor in the stored dtype, and whether every float16 is finite."""

    kind = torch_dtype(dtype)
    rounded = values.to(kind)
    if dtype in ("BF16", "F16"):
        # A vector conversion leaves other bits in a NaN than a scalar one does.
        rounded.masked_fill_(values.isnan(), float("nan"))
    return rounded, dtype != "F16" or bool(rounded.isfinite().all())
