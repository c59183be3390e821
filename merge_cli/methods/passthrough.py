"""Passthrough: tensors as they are, or scaled. What frankenmerges stack layers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.fused import FusedForm
from merge_cli.methods.parameters import PerModel, each
from merge_cli.methods.registry import merge_method


def unscaled(scale: Sequence[float]) -> bool:
    """A tensor that is not scaled is copied, byte for byte."""
    return scale[0] == 1.0


def fused(at: Any, prepared: None, *, scale: Sequence[float]) -> FusedForm:
    """The formula as one loop."""
    return FusedForm(scale)


@merge_method("passthrough", count=(1, 1), is_identity=unscaled, supports_numpy=True, fused=fused)
def passthrough(models: list[Array], *, scale: PerModel[float] = each(1.0)) -> Array:
    """Copy the one source of each tensor.

    Args:
        scale: multiply the tensor by this; 1 copies its bytes.
    """
    return models[0] if unscaled(scale) else models[0] * scale[0]
