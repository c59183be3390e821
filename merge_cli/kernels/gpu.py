"""Whether Triton's kernels serve a tensor: where it lies, and whether Triton works there."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any


def kernels_for(x: Any) -> ModuleType | None:
    """The module of Triton kernels for a tensor on a GPU; None where plain torch must do."""
    if x.device.type != "cuda" or missing():
        return None
    from merge_cli.kernels import triton_kernels

    return triton_kernels


@cache
def missing() -> str:
    """Why Triton cannot be used on this machine's GPUs; empty when it can.

    It compiles with a C compiler that a machine may not have: the smallest kernel is tried.
    """
    try:
        from merge_cli.kernels import triton_kernels

        triton_kernels.keep_mask(1, 0, 0, 0, 2**31, "cuda")
    except Exception as error:
        return f"Triton does not work here ({type(error).__name__}: {error})"
    return ""
