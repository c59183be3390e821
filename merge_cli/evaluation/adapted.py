"""A loaded model takes the weights that its adapter makes of it: the numbers that a merge reads."""

from __future__ import annotations

from typing import Any

from merge_cli.checkpoint.tensors import Float32, read_numbers, reading
from merge_cli.engine.parameter_slices import parameter_slices
from merge_cli.errors import SourceError
from merge_cli.lora.adapter import WEIGHTS
from merge_cli.sources.source import Source

_HINT = "Merge the two into a folder first: `merge_method: passthrough`, one model."


def apply_adapter(net: Any, source: Source) -> None:
    """Rewrite every parameter that an adapter changes, in float32 and rounded once.

    Args:
        net: of the model without its adapter, whole in memory.

    Raises:
        SourceError: the adapter changes what the loaded model has no parameter for.
    """
    import torch

    assert source.adapter is not None, "a model without one is as it was loaded"
    file = source.adapter.root / WEIGHTS
    updates = {
        name: tensor
        for name, tensor in source.tensors.items()
        if any(ref.path == file for ref in tensor.stored)
    }
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    # Where a weight lies is seen by its content before the update.
    before = {
        name: tensor.made_of if isinstance(tensor, Float32) else None
        for name, tensor in updates.items()
    }
    slices, _ = parameter_slices(shapes, {**source.tensors, **before}, net)
    tied = bool(source.config.get("tie_word_embeddings", net.config.tie_word_embeddings))
    unknown = next((name for name in updates if name not in slices), "")
    if unknown or tied != bool(net.config.tie_word_embeddings):
        message = "its adapter changes what the loaded model shares or lacks"
        raise SourceError(message, model=source.label, tensor=unknown, hint=_HINT)
    with reading() as read, torch.no_grad():
        for name, tensor in updates.items():
            target = slices[name].values
            numbers = read_numbers(read, tensor, 0, tensor.size)
            target.copy_(torch.from_numpy(numbers).reshape(target.shape))
