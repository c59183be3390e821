"""Which tensors of a model, as its files name them, are what in the loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.header import TensorRef
from merge_cli.checkpoint.source import Source
from merge_cli.dam.models import kinds_of
from merge_cli.evaluation.seats import by_name, filled_layers, layer_of


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer.

    Attributes:
        stored: the tensor's name in the model's files.
        module: the module's name in the loaded model.
        width: of its input.
        input_first: it is stored [in, out].
    """

    stored: str
    module: str
    width: int
    input_first: bool


def parameters_of(net: Any, source: Source) -> dict[str, str]:
    """Stored name -> parameter, for every tensor that is one parameter of the loaded model."""
    stored = {t.name: t.shape for t in source.tensors.values() if isinstance(t, TensorRef)}
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name, parameter in by_name(stored, dict(net.named_parameters())).items():
        if parameter not in taken:
            found[name] = parameter
            taken.add(parameter)
    return found


def stored_parameters(net: Any, source: Source) -> set[str]:
    """Every tensor that is a parameter of a model, which may be empty, or a part of one."""
    names = parameters_of(net, source)
    taken = set(names.values())
    rest = {name: one for name, one in net.named_parameters() if name not in taken}
    loose = {name: ref.size for name, ref in source.tensors.items() if name not in names}
    filled = filled_layers(rest, loose)
    return set(names) | {name for name in loose if layer_of(name) in filled}


def linear_layers(net: Any, source: Source) -> list[LinearLayer]:
    """Every linear layer whose weight is stored, in the order of the model.

    A head that is tied to the embedding is none: what looks tokens up must not be regressed.
    """
    order = {name: number for number, (name, _) in enumerate(net.named_modules())}
    return sorted(_layers(net, source), key=lambda layer: order[layer.module])


def _layers(net: Any, source: Source) -> Iterator[LinearLayer]:
    kinds = kinds_of(net)
    for stored, parameter in parameters_of(net, source).items():
        module, _, last = parameter.rpartition(".")
        kind = kinds[parameter]
        if last == "weight" and kind in ("linear", "conv1d"):
            shape = net.get_parameter(parameter).shape
            if len(shape) == 2:
                first = kind == "conv1d"
                yield LinearLayer(stored, module, shape[0] if first else shape[1], first)
