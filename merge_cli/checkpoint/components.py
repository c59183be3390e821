"""The parts of a model: one for most, several for a pipeline as diffusers lays it out.

    model_index.json
    unet/config.json           unet/diffusion_pytorch_model.safetensors
    text_encoder/config.json   text_encoder/model.safetensors

A tensor of a part is called FOLDER/NAME, here and in a merge; its file has NAME alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

PIPELINE = "model_index.json"
STEMS = ("model", "diffusion_pytorch_model")  # what files of weights are called


def part_folders(names: Iterable[str]) -> list[str]:
    """The folders that hold weights; "" for a model that is one folder.

    Args:
        names: paths of all files, relative to the model.
    """
    listed = set(names)
    if PIPELINE not in listed:
        return [""]
    paths = (PurePosixPath(name) for name in listed if name.endswith(".safetensors"))
    return sorted({str(p.parent) for p in paths if len(p.parts) == 2}) or [""]


def names_in(folder: str, names: Iterable[str]) -> set[str]:
    """The files that lie in one of its folders themselves, without the folder's name."""
    prefix = f"{folder}/" if folder else ""
    inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return {name for name in inside if "/" not in name}


def stem_of(names: Iterable[str]) -> str:
    """What the files of weights in a folder are called."""
    own = any(PurePosixPath(name).name.startswith(STEMS[1]) for name in names)
    return STEMS[1] if own else STEMS[0]


def index_of(stem: str) -> str:
    """The file that says which tensor is in which of several shards."""
    return f"{stem}.safetensors.index.json"


def inside(folder: str, name: str) -> str:
    """A name as a pipeline knows it."""
    return f"{folder}/{name}" if folder else name
