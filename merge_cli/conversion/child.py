"""One pickled file to one safetensors file, in a process that may use so much memory.

    python -m merge_cli.conversion.child FILE TARGET LIMIT COPIES

torch's own unpickler with `weights_only` builds tensors and plain containers, and calls nothing.
Reads a JSON list from its standard input: names that other files have had. Prints one line of JSON:
what was written, what was left out, or why nothing was.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

# Where training programs put the weights among other things.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")


def main(file: str, target: str, limit: str, copies: str) -> dict[str, Any]:
    """Convert.

    Args:
        limit: bytes of memory beyond what the libraries take; 0 for no limit.
        copies: `keep` writes tensors that are another one's memory, too; `leave` leaves them out.
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
    except Exception as error:  # a pickle can break in any way it likes
        said = str(error).strip().splitlines() or [type(error).__name__]
        return {
            "error": said[0],
            "unsafe": "weights_only" in str(error) or type(error).__name__ == "UnpicklingError",
        }
    weights, left_out = _weights(torch, loaded)
    if not weights:
        return {"error": "there are no tensors in it", "unsafe": False}
    known = set(json.load(sys.stdin))
    own = {name: tensor for name, tensor in weights.items() if name not in known}
    kept, tied = _without_copies(own, keep=copies == "keep")
    temporary = f"{target}.new"
    try:
        save_file(kept, temporary, metadata={"format": "pt"})
        os.replace(temporary, target)
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        Path(temporary).unlink(missing_ok=True)  # a full disk has better use for it
        return {"unwritten": number}
    return {
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in kept.items()
        },
        "tied": tied,
        "left_out": left_out,
        "again": sorted(known & set(weights)),
    }


def _broken(file: Path) -> str:
    """What makes it no file of torch's, or none that is whole; empty otherwise."""
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
    """Why the system would not write; safetensors says so in words alone."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None


def _load(torch: Any, file: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # torch before 1.6


def _weights(torch: Any, loaded: Any) -> tuple[dict[str, Any], list[str]]:
    """Tensors by name, and what else there was."""
    while isinstance(loaded, dict):
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), dict)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, dict):
        return {}, []
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    return tensors, sorted(str(k) for k in loaded if str(k) not in tensors)


def _without_copies(weights: dict[str, Any], *, keep: bool) -> tuple[dict[str, Any], list[str]]:
    """Every tensor with memory of its own; of those that are one tensor the first that no head is.

    Returns:
        the tensors, and the names that were another one's.
    """
    owners: dict[tuple[Any, ...], str] = {}
    kept, tied = {}, []
    for name in sorted(weights, key=lambda name: ("head" in name, name)):
        tensor = weights[name]
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in owners:
            if keep:
                kept[name] = tensor.clone()
            else:
                tied.append(name)
            continue
        owners[place] = name
        # A part of a larger storage is copied out of it.
        kept[name] = tensor.contiguous().clone() if _shares(tensor) else tensor.contiguous()
    return kept, sorted(tied)


def _shares(tensor: Any) -> bool:
    used = tensor.numel() * tensor.element_size()
    return bool(tensor.untyped_storage().nbytes() != used)


def _limit_memory(room: int) -> None:
    """Addresses beyond what is taken now; macOS has no such limit."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
