"""Between storage formats and what is computed with: upcast once, round once.

The numpy half runs compiled and knows float32, bfloat16 and float16; the torch half knows float64
too. Rounding is to nearest, ties to even; a NaN is written as the format's plain quiet NaN.
"""

from __future__ import annotations

from typing import Any

from merge_cli.kernels.arrays import Array

COMPILED = frozenset(("F32", "BF16", "F16"))
_TORCH = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def decode_into(raw: Any, dtype: str, out: Any, base: Any = None) -> bool:
    """Stored bytes (numpy uint8) to float32 in `out`, less the base if there is one.

    Returns:
        whether every stored value is finite.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    if dtype == "BF16":
        halves = raw.view(np.uint16)
        if base is None:
            return not compiled.decode_bf16(halves, out)
        return not compiled.decode_bf16_delta(halves, base, out)
    if dtype == "F16":
        bad = compiled.decode_f16(raw.view(np.uint16), out)
    else:
        out[:] = raw.view(np.float32)
        bad = compiled.non_finite(out)
    if base is not None:
        np.subtract(out, base, out=out)
    return not bad


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

    stored = raw.view(getattr(torch, _TORCH[dtype]))
    return stored.to(torch.float64 if wide else torch.float32, copy=True)


def encode(values: Array, dtype: str) -> tuple[Array, bool]:
    """A tensor in the stored dtype, and whether every float16 is finite."""
    import torch

    kind = getattr(torch, _TORCH[dtype])
    rounded = values.to(kind)
    if dtype in ("BF16", "F16"):
        # A vector conversion leaves other bits in a NaN than a scalar one does.
        rounded.masked_fill_(values.isnan(), float("nan"))
    return rounded, dtype != "F16" or bool(rounded.isfinite().all())
