"""The parts of a model: one for most, several for a pipeline as diffusers lays it out.

    model_index.json
    unet/config.json           unet/diffusion_pytorch_model.safetensors
    text_encoder/config.json   text_encoder/model.safetensors

or for a model of sentence-transformers, whose modules.json names folders beside the model's own:

    modules.json   config.json           model.safetensors
                   1_Pooling/config.json
                   2_Dense/config.json   2_Dense/model.safetensors

A tensor of a part is called FOLDER/NAME, here and in a merge; its file has NAME alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from merge_cli.errors import CorruptFileError
from merge_cli.system.untrusted import read_json

PIPELINE = "model_index.json"
MODULES = "modules.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
STEMS = ("model", "diffusion_pytorch_model")  # what files of weights are called


def module_folders(root: Path, label: str = "") -> tuple[str, ...]:
    """The folders that modules.json names, "" for the model's own; none without such a file.

    Raises:
        CorruptFileError: it names none, or one that is not in the model's folder.
    """
    if not (root / MODULES).is_file():
        return ()
    listed = read_json(root / MODULES, label)
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise CorruptFileError("is not a list of modules", model=label, file=MODULES)
    folders: dict[str, None] = {}
    for module in listed:
        path = module.get("path")
        folder = PurePosixPath(path) if isinstance(path, str) else None
        if folder is None or folder.is_absolute() or ".." in folder.parts or "\\" in str(path):
            message = f"names a folder outside the model's: {path!r}"[:200]
            raise CorruptFileError(message, model=label, file=MODULES)
        folders["" if str(folder) == "." else str(folder)] = None
    return tuple(folders)


def part_folders(names: Iterable[str], modules: Iterable[str] = ()) -> list[str]:
    """The folders that hold weights; "" for a model that is one folder.

    Args:
        names: paths of all files, relative to the model.
        modules: the folders that its modules.json names.
    """
    listed = set(names)
    folders = [
        folder
        for folder in modules
        if not folder or any(name.endswith(_WEIGHTS) for name in names_in(folder, listed))
    ]
    if folders:
        return sorted(folders)
    if PIPELINE not in listed:
        return [""]
    paths = (PurePosixPath(name) for name in listed if name.endswith(".safetensors"))
    return sorted({str(p.parent) for p in paths if len(p.parts) == 2}) or [""]


def part_of(name: str, folders: Iterable[str]) -> str:
    """The folder, of these, that a tensor belongs to."""
    folder = name.rpartition("/")[0]
    return folder if folder in folders else ""


def names_in(folder: str, names: Iterable[str]) -> set[str]:
    """The files that lie in one of its folders themselves, without the folder's name."""
    prefix = f"{folder}/" if folder else ""
    inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return {name for name in inside if "/" not in name}


def stem_of(names: Iterable[str]) -> str:
    """What the files of weights in a folder are called."""
    is_diffusers = any(PurePosixPath(name).name.startswith(STEMS[1]) for name in names)
    return STEMS[1] if is_diffusers else STEMS[0]


def index_of(stem: str) -> str:
    """The file that says which tensor is in which of several shards."""
    return f"{stem}.safetensors.index.json"


def inside(folder: str, name: str) -> str:
    """A name as a pipeline knows it."""
    return f"{folder}/{name}" if folder else name
