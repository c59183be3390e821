"""Where each output tensor goes in a live model: a parameter, or a slice of one.

Most tensors are the parameter of that name. transformers renames some, and stacks experts that are
stored one by one. Where those lie is found by content, layer by layer, since the live model still
holds the weights that it was loaded with. A tensor that could be in either of two places is not
guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.layout import natural_key
from merge_cli.checkpoint.tensors import Read, read_numbers, reading
from merge_cli.errors import MismatchError, Problem
from merge_cli.planning.plan import Plan

_PROBE = 64  # elements of a row by which candidates are looked up before they are compared


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter, or a part of one.

    Attributes:
        index: of the part, as a subscript; () for the whole.
    """

    parameter: Any
    index: tuple[Any, ...] = ()

    @property
    def values(self) -> Any:
        """The numbers, without a gradient; writing into them writes into the model.

        autograd counts it, and notices if a weight that it still needs has changed.
        """
        return self.parameter.detach()[self.index]


def find_parameter_slices(plan: Plan, net: Any) -> dict[str, ParameterSlice]:
    """For each output tensor the parameter or buffer that holds it, or a part of one.

    Args:
        net: holds the weights of the plan's config source.

    Raises:
        MismatchError: parameters that no output tensor is for: transformers builds them from
            tensors that are stored otherwise, or they are not in this process's memory.
    """
    elsewhere = [
        name
        for name, value in (*net.named_parameters(), *net.named_buffers())
        if value.device.type == "meta"
    ]
    config_source = plan.sources[plan.config_index].tensors
    stored = {task.name: config_source.get(task.name) for task in plan.tasks}
    slices, needed = parameter_slices({task.name: task.shape for task in plan.tasks}, stored, net)
    problems = [
        Problem("no tensor of the output is this parameter, so that it cannot be rewritten", name)
        for name in sorted(needed)
    ] + [Problem("does not fit in memory, so that it cannot be rewritten", n) for n in elsewhere]
    if problems:
        raise MismatchError(problems, "no live model can be made of what is stored")
    return slices


def parameter_slices(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Any], net: Any
) -> tuple[dict[str, ParameterSlice], set[str]]:
    """Where tensors lie in a live model, and its parameters in which none does.

    Args:
        shapes: of the tensors, by name.
        stored: what the model was loaded from, by the same names; only `TensorRef`s are looked at.
        net: holds their content.
    """
    needed = dict(net.named_parameters())
    parameters = needed | {name: value for name, value in net.named_buffers() if name not in needed}
    names = by_name(shapes, parameters)
    slices = {
        name: ParameterSlice(parameters[parameter_name]) for name, parameter_name in names.items()
    }
    for parameter_name in names.values():
        needed.pop(parameter_name, None)
    if needed and all(value.device.type != "meta" for value in parameters.values()):
        loose = (stored.get(name) for name in shapes if name not in slices)
        refs = [ref for ref in loose if isinstance(ref, TensorRef)]
        for name, parts in _by_content(needed, refs).items():
            slices |= parts
            del needed[name]
    return slices, set(needed)


def filled_layers(parameters: Mapping[str, Any], loose: Mapping[str, int]) -> set[str]:
    """Layers in which loose tensors have as many elements as the parameters that no name is for.

    Args:
        parameters: of a model that may be empty.
        loose: tensors that are no parameter's name, and their sizes.
    """
    room: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for name, parameter in parameters.items():
        room[layer_of(name)] += parameter.numel()
    for name, size in loose.items():
        stored[layer_of(name)] += size
    return {layer for layer, size in room.items() if stored[layer] == size}


def by_name(stored: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any]) -> dict[str, str]:
    """Stored tensors that are a parameter of that name, or of one with something before it.

    Args:
        stored: their shapes, by name.
        parameters: whatever has a `shape`, by transformers' name.
    """
    ends: dict[str, list[str]] = {}
    for name in parameters:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(name)
    result = {}
    for name, shape in stored.items():
        parameter_name = name if name in parameters else None
        if parameter_name is None and len(ends.get(name, ())) == 1:
            parameter_name = ends[name][0]
        if parameter_name is not None and tuple(parameters[parameter_name].shape) == shape:
            result[name] = parameter_name
    return result


def layer_of(name: str) -> str:
    """The first number of a name: that of its layer; "" where it has none."""
    result = re.search(r"(?:^|\.)(\d+)\.", name)
    return result.group(1) if result else ""


def _by_content(
    parameters: Mapping[str, Any], loose: Iterable[TensorRef]
) -> dict[str, dict[str, ParameterSlice]]:
    """Parameters that are made up of stored matrices, with the place of each of these."""
    by_layer: dict[str, list[TensorRef]] = {}
    for tensor in sorted(loose, key=lambda tensor: natural_key(tensor.name)):
        by_layer.setdefault(layer_of(tensor.name), []).append(tensor)
    slices_of = {}
    with reading() as read:
        for name, parameter in parameters.items():
            slices = _parts(parameter, by_layer.get(layer_of(name), ()), read)
            if sum(part.values.numel() for part in slices.values()) == parameter.numel():
                slices_of[name] = slices
    claims = Counter(tensor for slices in slices_of.values() for tensor in slices)
    return {
        name: slices
        for name, slices in slices_of.items()
        if all(claims[tensor] == 1 for tensor in slices)
    }


def _parts(parameter: Any, tensors: Iterable[TensorRef], read: Read) -> dict[str, ParameterSlice]:
    """Stored matrices that lie in a parameter, each with its part; equal ones in order."""
    import torch

    width = parameter.shape[-1] if parameter.dim() else 0
    fitting = [t for t in tensors if t.shape[-1:] == (width,) and len(t.shape) <= parameter.dim()]
    free: dict[tuple[tuple[int, ...], bytes], list[ParameterSlice]] = {}
    for shape in {tensor.shape for tensor in fitting}:
        for part in _candidate_slices(parameter, shape):
            free.setdefault((shape, _probe(part.values)), []).append(part)
    result: dict[str, ParameterSlice] = {}
    for tensor in fitting:
        numbers = torch.from_numpy(read_numbers(read, tensor, 0, tensor.size))
        values = numbers.to(parameter.detach()).float().reshape(tensor.shape)
        candidates = free.get((tensor.shape, _probe(values)), [])
        equal = (n for n, part in enumerate(candidates) if _is(part, values))
        if (number := next(equal, None)) is not None:
            result[tensor.name] = candidates.pop(number)
        elif parameter.shape == tensor.shape and any(_is(s, values) for s in result.values()):
            return {}  # two tensors that are the same, and one place
    return result


def _candidate_slices(parameter: Any, shape: tuple[int, ...]) -> Iterator[ParameterSlice]:
    """Where a matrix of this shape may lie in a stack of matrices, or in a taller one."""
    if tuple(parameter.shape) == shape:
        yield ParameterSlice(parameter)
        return
    if len(shape) != 2 or parameter.dim() > 3 or parameter.shape[-2] % shape[0]:
        return
    experts = [(e,) for e in range(len(parameter))] if parameter.dim() == 3 else [()]
    for expert in experts:
        for start in range(0, parameter.shape[-2], shape[0]):
            yield ParameterSlice(parameter, (*expert, slice(start, start + shape[0])))


def _is(part: ParameterSlice, values: Any) -> bool:
    """Whether it holds these numbers, as float32 has them."""
    import torch

    return torch.equal(part.values.float(), values)


def _probe(values: Any) -> bytes:
    """The beginning of its first row."""
    return bytes(values.reshape(-1)[:_PROBE].detach().float().cpu().numpy().tobytes())
