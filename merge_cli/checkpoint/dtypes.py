"""The package's table of dtypes: names, sizes, and what torch and numpy call them.

Safetensors' names (`BF16`) are used wherever tensors are read, planned and written; torch's names
(`bfloat16`) in recipes, flags and config.json.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Safetensors' name -> (bytes of an element, torch's name). The order is the format's own: writers
# sort by it, widest first, so that every tensor stays aligned.
DTYPES: dict[str, tuple[int, str]] = {
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
    "F32": (4, "float32"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "BF16": (2, "bfloat16"),
    "F16": (2, "float16"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
MERGEABLE = ("F64", "F32", "BF16", "F16")  # widest first
SAFETENSORS_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
_WIDTHS = {name: width for key, (width, torch_name) in DTYPES.items() for name in (key, torch_name)}


def width_of(dtype: str) -> int:
    """Bytes of an element, by safetensors' name of the dtype or torch's."""
    return _WIDTHS[dtype]


def torch_dtype(dtype: str) -> Any:
    """torch's dtype by safetensors' name."""
    import torch

    return getattr(torch, DTYPES[dtype][1])


def numpy_dtype(dtype: str) -> Any:
    """What numpy reads stored floats as; bfloat16 has no type of its own there, only its bits."""
    import numpy as np

    return {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]


def promoted(dtypes: Collection[str]) -> str:
    """The narrowest format that holds numbers of all of these, as torch promotes them."""
    result = set(dtypes)
    if result == {"BF16", "F16"}:
        return "F32"
    return next(dtype for dtype in MERGEABLE if dtype in result)
