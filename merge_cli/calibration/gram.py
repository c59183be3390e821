"""Matrices of what linear layers see: X^T X over every token of a source's examples.

In rounds of layers whose sums fit into memory; each round is a pass over the examples. A sum is
made of the same batches in the same order whatever the rounds are, so its bytes are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from merge_cli.calibration.data import LinearLayer, batches_of, linear_layers
from merge_cli.calibration.plan import OnTokens, SourcePart
from merge_cli.calibration.store import Writer
from merge_cli.checkpoint.statistics import StatisticsEntry
from merge_cli.engine.device import free_memory
from merge_cli.errors import NonFiniteError
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.live import LiveModel

_SUM_BYTES = 8  # of an element; a batch's float32 product comes on top, one at a time
_ROOM = 0.5  # of the free memory for sums; activations take the rest
_LOGIT_BYTES = 1 << 28
Group = tuple[LinearLayer, ...]


def gather_grams(
    live: LiveModel, part: SourcePart, writer: Callable[..., Writer], on_tokens: OnTokens
) -> Writer:
    """Every matrix of a model.

    Args:
        writer: `writer(shapes, entries)`, for the file that is made.
        on_tokens: called with the tokens done and in all.

    Raises:
        NonFiniteError: a layer sees what is not a number.
    """
    examples, options = part.examples.items, part.statistics
    layers = linear_layers(live.net, part.source)
    groups = _observed(live, layers, examples[-1])  # the shortest
    file = writer(
        {str(i): (group[0].width, group[0].width) for i, group in enumerate(groups)},
        {
            layer.stored: StatisticsEntry(str(i), layer.input_first)
            for i, group in enumerate(groups)
            for layer in group
        },
    )
    tokens = min(options.batch_tokens, max(1, _LOGIT_BYTES // (4 * live.vocabulary)))
    batches = batches_of(examples, tokens)
    rounds = _rounds(groups, _room(live), options.rounds)
    total, done = len(rounds) * part.examples.tokens, 0
    for numbers in rounds:
        sums = {i: _zeros(live, groups[i][0].width) for i in numbers}
        with _summing(live, {groups[i][0].module: sums[i] for i in numbers}):
            for batch in batches:
                _forward(live, batch)
                done += sum(len(item.ids) for item in batch)
                on_tokens(done, total)
        for i in numbers:
            result = sums.pop(i).div_(part.examples.tokens)
            _need_finite(result, live, groups[i][0])
            file.put(str(i), result.float().cpu().numpy())
    part.about.update(passes=len(batches))
    return file


def _observed(live: LiveModel, layers: Sequence[LinearLayer], example: Example) -> list[Group]:
    """Layers in groups that see the very same tensor, found by looking.

    Every input is held until the end, so that no two of them can be at the same place. A layer that
    sees nothing here (an expert that no token is sent to) has a matrix of its own.
    """
    seen: dict[str, list[object]] = {layer.module: [] for layer in layers}
    held: list[Any] = []

    def look(name: str, x: Any) -> None:
        if x.numel():
            held.append(x)
            seen[name].append((x.data_ptr(), tuple(x.shape), x.stride(), x._version))

    with _hooked(live, {layer.module: look for layer in layers}):
        _forward(live, [example])
    groups: dict[object, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(tuple(seen[layer.module]) or layer.module, []).append(layer)
    return [tuple(group) for group in groups.values()]


def _need_finite(matrix: Any, live: LiveModel, layer: LinearLayer) -> None:
    if not math.isfinite(float(matrix.trace())):  # the sum of all squares
        message = "what this layer sees is NaN or Inf on some example"
        hint = "Use `dtype: float32` under `statistics:`; are the model's weights finite?"
        raise NonFiniteError(message, model=live.label, tensor=layer.stored, hint=hint)


def _rounds(groups: Sequence[Group], room: int, least: int | None) -> list[list[int]]:
    """Numbers of groups, each round of at most `room` bytes, in at least so many rounds."""
    sizes = [_SUM_BYTES * group[0].width ** 2 for group in groups]
    if least is not None:
        room = min(room, max(1, -(-sum(sizes) // least)))
    result: list[list[int]] = []
    used = 0
    for number, size in enumerate(sizes):
        if not result or used + size > room:
            result.append([])
            used = 0
        result[-1].append(number)
        used += size
    return result


def _room(live: LiveModel) -> int:
    kind, _, index = live.input_device.partition(":")
    return int(free_memory(kind, (int(index or 0),)) * _ROOM)


def _zeros(live: LiveModel, width: int) -> Any:
    import torch

    return torch.zeros(width, width, dtype=torch.float64, device=live.input_device)


@contextmanager
def _summing(live: LiveModel, sums: dict[str, Any]) -> Iterator[None]:
    """Add what modules see to their sums."""

    def add(name: str, x: Any) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        sums[name].add_((flat.T @ flat).to(sums[name].device))

    with _hooked(live, dict.fromkeys(sums, add)):
        yield


@contextmanager
def _hooked(live: LiveModel, looking: dict[str, Callable[[str, Any], None]]) -> Iterator[None]:
    """Show modules' inputs to functions of the module's name and the input."""

    def hook(name: str, look: Callable[[str, Any], None]) -> Any:
        def before(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            look(name, args[0] if args else next(iter(named.values())))

        module = live.net.get_submodule(name)
        return module.register_forward_pre_hook(before, with_kwargs=True)

    hooks = [hook(name, look) for name, look in looking.items()]
    try:
        yield
    finally:
        for item in hooks:
            item.remove()


def _forward(live: LiveModel, batch: Sequence[Example]) -> None:
    import torch

    ids = torch.tensor([item.ids for item in batch], device=live.input_device)
    with torch.no_grad():  # inference mode would not count the versions of a tensor
        live.net(input_ids=ids, use_cache=False)
    live.count(ids.numel(), 1)
