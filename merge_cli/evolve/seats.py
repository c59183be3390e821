"""Where in a live model each output tensor goes.

Most tensors are the parameter of that name. transformers calls some otherwise, and stacks experts
that are stored one by one; where those lie is found by content, layer by layer, since the live
model still holds its donor's weights. What could be either of two is not guessed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.layout import natural_key
from merge_cli.checkpoint.raw import FilePool, read_into
from merge_cli.checkpoint.stored import read_numbers
from merge_cli.checkpoint.tensors import Read
from merge_cli.engine.plan import Plan
from merge_cli.errors import MismatchError, Problem

_PROBE = 64  # elements of a row by which candidates are looked up before they are compared


def find_seats(plan: Plan, net: Any) -> dict[str, Any]:
    """For each output tensor the parameter or buffer that holds it, or a part of one.

    Args:
        net: holds the weights of the plan's donor.

    Raises:
        MismatchError: parameters that no output tensor is for: transformers builds them from
            tensors that are stored otherwise, or they are not in this process's memory.
    """
    found = dict(net.named_parameters())
    needed = set(found)
    found |= {name: value for name, value in net.named_buffers() if name not in found}
    ends: dict[str, list[str]] = {}
    for name in found:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(name)
    seats: dict[str, Any] = {}
    for task in plan.tasks:
        own: str | None = task.name if task.name in found else None
        if own is None and len(ends.get(task.name, ())) == 1:
            own = ends[task.name][0]  # transformers may put a prefix before it
        if own is not None and tuple(found[own].shape) == task.shape:
            seats[task.name] = found[own]
            needed.discard(own)
    elsewhere = [name for name, value in found.items() if value.device.type == "meta"]
    if not elsewhere and needed:
        donor = plan.sources[plan.donor].tensors
        loose = (donor.get(task.name) for task in plan.tasks if task.name not in seats)
        stored = [ref for ref in loose if isinstance(ref, TensorRef)]
        stacked, covered = _stacked({name: found[name] for name in needed}, stored)
        seats |= stacked
        needed -= covered
    problems = [
        Problem("no tensor of the output is this parameter, so that it cannot be rewritten", name)
        for name in sorted(needed)
    ] + [Problem("does not fit in memory, so that it cannot be rewritten", n) for n in elsewhere]
    if problems:
        raise MismatchError(problems, "no live model can be made of what is stored")
    return seats


def _stacked(
    parameters: Mapping[str, Any], loose: Iterable[TensorRef]
) -> tuple[dict[str, Any], set[str]]:
    """Stored matrices as parts of stacked parameters, and the parameters that they fill."""
    by_layer: dict[str, list[TensorRef]] = {}
    for tensor in sorted(loose, key=lambda tensor: natural_key(tensor.name)):
        by_layer.setdefault(_layer(tensor.name), []).append(tensor)
    files = FilePool(os.O_RDONLY)

    def read(ref: TensorRef, start: int, buffer: memoryview) -> None:
        offset = ref.offset + start * DTYPES[ref.dtype][0]
        read_into(files, ref.path, offset, buffer, ref.model)

    found = {}
    try:
        for name, parameter in parameters.items():
            taken = _parts(parameter, by_layer.get(_layer(name), ()), read)
            if sum(part.numel() for part in taken.values()) == parameter.numel():
                found[name] = taken
    finally:
        files.close()
    claims = Counter(tensor for taken in found.values() for tensor in taken)
    certain = {
        name: taken for name, taken in found.items() if all(claims[tensor] == 1 for tensor in taken)
    }
    seats = {tensor: part for taken in certain.values() for tensor, part in taken.items()}
    return seats, set(certain)


def _layer(name: str) -> str:
    """The first number of a name: that of its layer."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found.group(1) if found else ""


def _parts(stack: Any, tensors: Iterable[TensorRef], read: Read) -> dict[str, Any]:
    """Matrices that lie in [experts, rows, columns], each with its part; equal ones in order.

    A matrix is a stack of one, a vector a matrix of one row.
    """
    import torch

    if not 1 <= stack.dim() <= 3:
        return {}
    parts = stack.detach()[(None,) * (3 - stack.dim())]
    rows, columns = parts.shape[1:]
    fitting = {
        tensor: (1, *tensor.shape)[-2:]
        for tensor in tensors if tensor.shape[-1:] == (columns,) and len(tensor.shape) <= 2
    }  # fmt: skip
    fitting = {tensor: shape for tensor, shape in fitting.items() if rows % shape[0] == 0}
    free: dict[tuple[int, bytes], list[Any]] = {}
    for tall in {shape[0] for shape in fitting.values()}:
        for part in (part for expert in parts for part in expert.split(tall)):
            free.setdefault((tall, _probe(part)), []).append(part)
    found = {}
    for tensor, shape in fitting.items():
        values = torch.from_numpy(read_numbers(read, tensor, 0, tensor.size))
        values = values.to(parts).reshape(shape)
        candidates = free.get((shape[0], _probe(values)), [])
        equal = (n for n, part in enumerate(candidates) if torch.equal(part, values))
        if (number := next(equal, None)) is not None:
            found[tensor.name] = candidates.pop(number)
        elif stack.shape == tensor.shape and found and _equals(found, values):
            return {}  # two tensors that are the same, and one place
    return found


def _equals(found: Mapping[str, Any], values: Any) -> bool:
    import torch

    return any(torch.equal(part, values) for part in found.values())


def _probe(matrix: Any) -> bytes:
    """The beginning of its first row."""
    return bytes(matrix[0, :_PROBE].detach().float().cpu().numpy().tobytes())
