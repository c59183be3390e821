"""Converting one pickled file to safetensors, in a separate process with limited memory.

    python -m merge_cli.conversion.child FILE TARGET LIMIT COPIES

torch's unpickler with `weights_only` builds tensors and plain containers, and calls nothing.
Standard input is a JSON list: names of tensors that earlier files had. Standard output is one line
of JSON: what was written, what was left out, or the error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from merge_cli.formats.pickled import model_items
from merge_cli.system.untrusted import Unreadable


def main(file: str, target: str, limit: str, copies: str) -> dict[str, Any]:
    """Convert.

    Args:
        limit: bytes of memory beyond what the libraries use; 0 for no limit.
        copies: `keep` also writes tensors that share another one's memory; `leave` does not.
    """
    import torch
    from safetensors.torch import save_file

    if int(limit):
        _limit_memory(int(limit))
    broken = _broken(Path(file))
    if broken:
        return {"error": broken, "unsafe": False}
    try:
        loaded = _load(torch, file)
    except Exception as error:  # a broken pickle can raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {
            "error": lines[0],
            "unsafe": "weights_only" in str(error) or type(error).__name__ == "UnpicklingError",
        }
    weights, left_out = _weights(torch, loaded)
    if not weights:
        return {"error": "there are no tensors in it", "unsafe": False}
    converted = set(json.load(sys.stdin))
    new = {name: tensor for name, tensor in weights.items() if name not in converted}
    tensors, tied = _without_copies(new, keep=copies == "keep")
    temporary = f"{target}.new"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, target)
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        Path(temporary).unlink(missing_ok=True)  # the disk is full
        return {"unwritten": number}
    return {
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape)]
            for name, t in tensors.items()
        },
        "tied": tied,
        "left_out": left_out,
        "again": sorted(converted & set(weights)),
    }


def _broken(file: Path) -> str:
    """Why it is not a complete file of torch's; empty if it is."""
    with file.open("rb") as opened:
        start = opened.read(2)
    if not start:
        return "it is empty"
    if start == b"PK" and not zipfile.is_zipfile(file):
        return "its end is missing"
    if start != b"PK" and start[:1] != b"\x80":
        return "it does not begin as files of torch do"
    return ""


def _error_number(error: Exception) -> int | None:
    """The system's error number, which safetensors only has in its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _load(torch: Any, file: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # torch before 1.6


def _weights(torch: Any, loaded: Any) -> tuple[dict[str, Any], list[str]]:
    """Tensors by name, and the names of everything else in the state dict."""
    try:
        items, _ = model_items(loaded, lambda item: isinstance(item, dict))
    except Unreadable:
        return {}, []
    tensors = {name: item for name, item in items.items() if isinstance(item, torch.Tensor)}
    return tensors, sorted(items.keys() - tensors)


def _without_copies(weights: dict[str, Any], *, keep: bool) -> tuple[dict[str, Any], list[str]]:
    """One tensor for each piece of memory: of those that share it the first that is not a head.

    Returns:
        the tensors, and the names of those that shared another one's memory.
    """
    owners: dict[tuple[Any, ...], str] = {}
    tensors, tied = {}, []
    for name in sorted(weights, key=lambda name: ("head" in name, name)):
        tensor = weights[name]
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in owners:
            if keep:
                tensors[name] = tensor.clone()
            else:
                tied.append(name)
            continue
        owners[memory] = name
        # A part of a larger storage is copied out of it.
        tensors[name] = tensor.contiguous().clone() if _shares(tensor) else tensor.contiguous()
    return tensors, sorted(tied)


def _shares(tensor: Any) -> bool:
    used = tensor.numel() * tensor.element_size()
    return bool(tensor.untyped_storage().nbytes() != used)


def _limit_memory(extra: int) -> None:
    """Limit the address space beyond what is used now; macOS has no such limit."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
