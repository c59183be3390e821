"""How positions are stretched: `rope_scaling` from the keys and tensors of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merge_cli.errors import SourceError
from merge_cli.formats.gguf.architecture_keys import MAX_WIDTH, ArchitectureKeys
from merge_cli.formats.gguf.architectures import Shapes
from merge_cli.formats.gguf.header import BlockTensor
from merge_cli.system.untrusted import Unreadable

# Llama 3.1 and its successors: the length that the models were trained on before, and where
# frequencies begin and end to be scaled. Files have the factors that follow from these alone.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scaling_of(keys: ArchitectureKeys, length: int) -> dict[str, Any] | None:
    """`rope_scaling`, as far as keys say it.

    Args:
        length: of the text that the model is for.

    Raises:
        Unreadable: a kind that is not known, or a number out of bounds.
    """
    # A factor without a type is a linear one.
    kind = keys.get("rope.scaling.type") or ("linear" if "rope.scaling.factor" in keys else None)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise Unreadable(f"rope.scaling.type {str(kind)[:60]!r} is not understood")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        original = keys.number("rope.scaling.original_context_length", MAX_WIDTH, length)
        scaling["original_max_position_embeddings"] = original
    return scaling


def llama3_scaling(
    raw: bytes, factors: BlockTensor, shapes: Shapes, theta: float, where: Mapping[str, str]
) -> dict[str, Any] | None:
    """`rope_scaling` of Llama 3.1, whose files hold a factor for each frequency.

    Raises:
        SourceError: factors that do not follow from the numbers that those models have.
    """
    import numpy as np

    refused = SourceError(
        "its factors of rotary frequencies are not understood: they are not Llama 3.1's",
        **where,
        tensor=factors.name,
    )
    if factors.kind.dtype != "F32" or factors.shape != (shapes.head // 2,):
        raise refused
    stored = np.frombuffer(raw, np.float32).astype(np.float64)
    if len(stored) != shapes.head // 2 or not np.isfinite(stored).all():
        raise refused
    factor = float(f"{stored.max():.6g}")  # 8, not what float32 made of a quotient
    if (stored == 1).all():
        return None
    computed = llama3_factors(shapes.head, theta, factor)
    if not np.allclose(stored, computed, rtol=1e-4, atol=0):
        raise refused
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_factors(head: int, theta: float, factor: float) -> Any:
    """By how much Llama 3.1 divides each rotary frequency: float64 [head / 2].

    Long waves by `factor`, short ones by 1, and those between by a smooth mean of both. Llama 3.1's
    reference code, `apply_scaling`.
    """
    import numpy as np

    low, high, length = (float(number) for number in LLAMA3.values())
    waves = 2 * math.pi * theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
