"""The tensors of state dicts: which fit one another, which share memory, what their dtypes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.dtypes import MERGEABLE, SAFETENSORS_NAMES
from merge_cli.errors import MismatchError, Problem

if TYPE_CHECKING:
    import torch

StateDict = Mapping[str, "torch.Tensor"]
_LISTED = 8  # names in a message


def check_tensors(given: Mapping[str, StateDict], reference: str) -> None:
    """Whether state dicts can be merged with one another.

    Args:
        given: by what messages call each.
        reference: which of them the others must be like.

    Raises:
        MismatchError: every name, shape and kind of tensor that cannot be merged.
    """
    problems: list[Problem] = []
    expected = given[reference]
    for label, tensors in given.items():
        lacking = [name for name in expected if name not in tensors]
        extra = [name for name in tensors if name not in expected]
        for names, relation in ((lacking, "lacks"), (extra, f"is not in {reference}:")):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                listed = ", ".join(names[:_LISTED])
                problems.append(Problem(f"{relation} {listed}{more}", label))
        for name, tensor in tensors.items():
            wrong = _unfit(tensor)
            if not wrong and name in expected and not _unfit(expected[name]):
                shape, other = tuple(tensor.shape), tuple(expected[name].shape)
                if shape != other:
                    wrong = f"has the shape {shape}, and {other} in {reference}"
            if wrong:
                problems.append(Problem(wrong, f"{label}[{name!r}]"))
    if problems:
        raise MismatchError(problems, "the state dicts cannot be merged")


def _unfit(tensor: Any) -> str:
    """Why this is no tensor that can be merged or copied; empty where it is one."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return f"is not a tensor but {type(tensor).__name__}"
    if hasattr(tensor, "full_tensor"):
        return "is spread over processes: gather it first (full_tensor())"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantised"
    if tensor.is_meta:
        return "has no numbers (it is on the meta device)"
    if (tensor.is_floating_point() and dtype_name(tensor) not in MERGEABLE) or tensor.is_complex():
        return f"is {str(tensor.dtype).removeprefix('torch.')}, which is not merged"
    return ""


def dtype_name(tensor: torch.Tensor) -> str:
    """safetensors' name of a tensor's dtype; empty where no recipe may name it."""
    return SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."), "")


def same_memory(name: str, given: Sequence[StateDict]) -> object:
    """Equal for two names whose tensors are the same memory in every dict."""
    tensors = [tensors[name] for tensors in given]
    if not all(tensor.numel() for tensor in tensors):
        return name
    return tuple((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
