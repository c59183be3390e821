"""Which files of a folder or repository hold a model's weights, and what their index says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from merge_cli.checkpoint.components import STEMS, index_of, stem_of
from merge_cli.checkpoint.header import TensorRef
from merge_cli.checkpoint.quantised import ADVICE
from merge_cli.errors import CorruptFileError, SourceError

INDEX = index_of(STEMS[0])
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Whole copies of the same weights in another naming, which some repositories carry beside them.
_DUPLICATES = ("consolidated",)


def find_shards(
    names: set[str], index: Any, label: str
) -> tuple[list[str], Mapping[str, str] | None]:
    """Which files hold the weights, in transformers' order of preference, and the index's map."""
    stem = stem_of(names)
    whole, file = f"{stem}.safetensors", index_of(stem)
    if whole in names:
        return [whole], None
    if index is not None:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFileError("has no weight_map", model=label, file=file)
        checked: set[str] = set()
        for tensor, shard in weight_map.items():
            if isinstance(shard, str) and shard in checked:
                continue
            place = PurePosixPath(str(shard))
            if not str(shard).isprintable() or len(str(shard)) > 200:
                what = f"names a file by what is no name: {str(shard)[:60]!r}"
                raise CorruptFileError(what, model=label, file=file, tensor=tensor)
            if place.is_absolute() or ".." in place.parts or "\\" in str(shard):
                what = f"names a file outside the model's folder: '{shard}'"
                raise CorruptFileError(what, model=label, file=file, tensor=tensor)
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                what = f"names a file that is not safetensors: {shard!r}"
                raise CorruptFileError(what, model=label, file=file, tensor=tensor)
            checked.add(shard)
        return sorted(checked), weight_map
    found = sorted(
        name
        for name in names
        if name.endswith(".safetensors")
        and not name.startswith("adapter_")
        and not name.startswith(_DUPLICATES)
    )
    if found:
        return found, None
    if any(name.startswith("adapter_") for name in names):
        what = "this is a LoRA adapter, not a model"
        raise SourceError(what, model=label, hint=f"Name its base, too: `BASE+{label}`.")
    pickled = sorted(name for name in names if name.endswith(_PICKLES))
    if pickled:
        what = f"its weights are pickled ({pickled[0]}), and opening a pickle runs its code"
        hint = f"Write it as safetensors; nothing in it is run: merge-cli convert {label} converted"
        raise SourceError(what, model=label, hint=hint)
    packed = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if packed:
        what = f"its weights are a GGUF file ({packed})"
        raise SourceError(what, model=label, hint=ADVICE["gguf"])
    raise SourceError("has no safetensors files", model=label, hint="Is this a model's folder?")


def join_shards(
    tensors: Mapping[str, Mapping[str, TensorRef]], weight_map: Mapping[str, str] | None, label: str
) -> dict[str, TensorRef]:
    joined: dict[str, TensorRef] = {}
    for shard, refs in tensors.items():
        if not joined.keys().isdisjoint(refs):
            name = next(name for name in refs if name in joined)
            what = f"occurs in two files, {joined[name].path.name} and {shard}"
            raise CorruptFileError(what, model=label, tensor=name)
        joined.update(refs)
    for name, shard in (weight_map or {}).items():
        if name not in tensors[shard]:
            what = "the index places this tensor here, but the file does not have it"
            raise CorruptFileError(what, model=label, file=shard, tensor=name)
    return joined
