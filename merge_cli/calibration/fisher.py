"""Importances: the mean over examples of the squared gradient of the log-likelihood.

One example at a time, as squares of a batch's gradient are not the sum of squares. A gradient is
squared and let go as soon as it is there, so that one model, one sum for each of its weights and
the largest gradient are held.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

from merge_cli.calibration.plan import OnTokens, SourcePart
from merge_cli.calibration.store import Writer
from merge_cli.checkpoint.statistics import StatisticsEntry
from merge_cli.engine.parameter_slices import ParameterSlice, parameter_slices
from merge_cli.errors import NonFiniteError, ResourceError
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.live import LiveModel

_BLOCK = 1 << 20


def gather_importances(
    live: LiveModel, part: SourcePart, writer: Callable[..., Writer], on_tokens: OnTokens
) -> Writer:
    """Every importance of a model.

    Args:
        writer: `writer(shapes, entries)`, for the file that is made.
        on_tokens: called with the tokens done and in all.

    Raises:
        NonFiniteError: a gradient is not a number.
        ResourceError: the model does not fit into memory whole.
    """
    if live.offloaded:
        hint = "Use `dtype: bfloat16` under `statistics:`, or a machine with more memory."
        raise ResourceError("gradients need the whole model in memory", where=live.label, hint=hint)
    tensors = part.source.tensors
    slices_by_name, _ = parameter_slices(
        {name: ref.shape for name, ref in tensors.items()}, tensors, live.net
    )
    names = {id(parameter): name for name, parameter in live.net.named_parameters()}
    # By parameter, so that a sum is let go when all its parts are written; a buffer has none.
    slices_by_parameter: dict[str, list[tuple[str, ParameterSlice]]] = {}
    for name, slice_ in slices_by_name.items():
        if id(slice_.parameter) in names:
            slices_by_parameter.setdefault(names[id(slice_.parameter)], []).append((name, slice_))
    sums = _accumulate(live, part, set(slices_by_parameter), on_tokens)
    shapes = {
        name: tensors[name].shape for slices in slices_by_parameter.values() for name, _ in slices
    }
    file = writer(shapes, {name: StatisticsEntry(name) for name in shapes})
    totals = {"elements": 0, "zero": 0, "sum": 0.0, "squares": 0.0}
    for parameter, named_slices in slices_by_parameter.items():
        importance = sums.pop(parameter).div_(len(part.examples.items))
        for name, slice_ in named_slices:
            values = importance[slice_.index].contiguous().cpu().numpy()
            _add_totals(totals, values, live, name)
            file.put(name, values)
    part.about.update(totals, passes=len(part.examples.items))
    return file


def _accumulate(
    live: LiveModel, part: SourcePart, parameters: set[str], on_tokens: OnTokens
) -> dict[str, Any]:
    """Sums over examples of squared gradients, float32, by parameter."""
    import torch

    sums: dict[str, Any] = {}
    hooks = []

    def squared(total: Any) -> Callable[[Any], None]:
        def add(parameter: Any) -> None:
            gradient = parameter.grad.float()
            total.addcmul_(gradient, gradient)
            parameter.grad = None

        return add

    for name, parameter in live.net.named_parameters():
        parameter.requires_grad_(name in parameters)
        if name in parameters:
            sums[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            # After the sum over all uses of a tied weight: it is one parameter.
            hook = parameter.register_post_accumulate_grad_hook(squared(sums[name]))
            hooks.append(hook)
    done, total = 0, part.examples.tokens
    try:
        for example in part.examples.items:
            _log_likelihood(live, example, part).backward()
            done += len(example.ids)
            on_tokens(done, total)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _log_likelihood(live: LiveModel, example: Example, part: SourcePart) -> Any:
    """The sum over counted tokens of their log-probability; labels as `targets` says."""
    import torch

    ids = torch.tensor([example.ids], device=live.input_device)
    logits = live.net(input_ids=ids, use_cache=False).logits[0, example.first - 1 : -1].float()
    live.count(ids.numel(), 1)
    labels = ids[0, example.first :]
    if part.statistics.targets == "sampled":
        labels = drawn(logits.detach(), example, part.seed)
    return logits.log_softmax(-1).gather(-1, labels.to(logits.device)[:, None]).sum()


def drawn(logits: Any, example: Example, seed: int) -> Any:
    """A label for each row of logits [n, vocabulary], drawn from the model's own prediction.

    A draw is a function of the seed, the example's tokens and the place: not of what came before.
    """
    import numpy as np
    import torch

    state = hashlib.sha256(f"{seed} {example.first} {len(example.ids)};".encode())
    state.update(example.ids.tobytes())
    key = int.from_bytes(state.digest()[:16], "little")
    chance = np.random.Generator(np.random.Philox(key=key)).random(len(logits))
    shares = logits.double().softmax(-1).cumsum(-1)
    level = torch.from_numpy(chance).to(shares.device)[:, None] * shares[:, -1:]
    return torch.searchsorted(shares, level, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def _add_totals(totals: dict[str, Any], importance: Any, live: LiveModel, name: str) -> None:
    """In float64, block by block."""
    import numpy as np

    flat = importance.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float64)
        totals["elements"] += len(block)
        totals["zero"] += int((block == 0).sum())
        totals["sum"] += float(block.sum())
        totals["squares"] += float(np.square(block).sum())
    if not math.isfinite(totals["squares"]):
        hint = "Use `dtype: float32` under `statistics:`; are the model's weights finite?"
        raise NonFiniteError("a gradient is NaN or Inf", model=live.label, tensor=name, hint=hint)
