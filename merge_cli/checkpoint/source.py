"""A source model, known from its headers: which tensors it has and where they lie.

Opening a source reads kilobytes: config.json, the index, the headers of the shards. For a model on
the Hub those are fetched alone; the shards follow in `fetch_weights`, only those that the merge
needs. Nothing here executes anything from a checkpoint.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from merge_cli.checkpoint import hub
from merge_cli.checkpoint.files import is_companion
from merge_cli.checkpoint.header import TensorRef, parse_header, read_header_file
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import CorruptFileError, HubError, SourceError
from merge_cli.recipe.reference import HUB, ModelRef, hub_id, local_folder

INDEX = "model.safetensors.index.json"
CARD = "README.md"  # says the licence and the languages
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Whole copies of the same weights in another naming, which some repositories carry beside them.
_DUPLICATES = ("consolidated",)


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        label: the model as the recipe names it.
        root: the folder of its files; a Hub model's shards may not be in it yet.
        tensors: name -> place.
        header_bytes: file name -> raw header, for digests.
        hub: the repository it comes from; None for a local folder.
        notes: what a reader of the plan should know.
    """

    label: str
    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    header_bytes: Mapping[str, bytes] = field(repr=False)
    hub: hub.HubModel | None = None
    notes: tuple[str, ...] = ()

    def ties(self, head: str) -> bool:
        """Whether the head is the input embedding: as the config says, here or in its text part.

        A config that is silent leaves it to the model class, which no one here knows: then a head
        that is stored is a head of its own.
        """
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, dict) and "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return head not in self.tensors

    def fingerprint(self, shards: Iterable[str] | None = None) -> str:
        """SHA-256 over config, headers, and samples of the weights: tells models apart.

        Sampling (64 places in each file) makes it free, and enough to notice another fine-tune or
        another revision; it is no proof against a forger.

        Args:
            shards: the files that matter, which must be there; default all.

        Raises:
            CorruptFileError: a file that cannot be read.
        """
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.header_bytes if shards is None else shards):
            state.update(name.encode() + b"\0" + self.header_bytes[name])
            try:
                _add_samples(state, self.root / name)
            except OSError as error:
                what = f"cannot be read: {error.strerror}"
                raise CorruptFileError(what, model=self.label, file=name) from error
        return state.hexdigest()

    @property
    def revision(self) -> str | None:
        """The commit that a Hub model was resolved to."""
        return self.hub.commit if self.hub else None


def open_source(model: ModelRef, folder: Path) -> Source:
    """Find a model and read its headers.

    Args:
        folder: where relative paths start: the recipe's folder.

    Raises:
        SourceError: missing, not a model, pickled weights only.
        CorruptFileError: an index or header that does not hold.
        HubError: a repository that cannot be had.
    """
    label = str(model)
    if model.lora:
        what = f"the LoRA adapter '{model.lora}' cannot be applied by this version"
        raise SourceError(what, model=label, hint="Merge it into its base with PEFT first.")
    path = local_folder(model.path, folder)
    if path is not None:
        if model.revision:
            what = f"a folder on disk has no revision '{model.revision}'"
            raise SourceError(what, model=label, hint="Remove the part after '@'.")
        return _open_folder(path, label)
    repository = hub_id(model.path)
    if repository is None and model.path.startswith(HUB):
        what = "not a name that the Hub has"
        raise HubError(what, model=label, hint=f"Write {HUB}organisation/name[@revision].")
    if repository is None:
        raise SourceError("no such folder", model=label, hint=_looked_for(model.path, folder))
    try:
        return _open_hub(hub.open_hub(repository, model.revision), label)
    except HubError as error:
        near = _neighbour(model.path, folder)
        if not near:
            raise
        # It reads like a Hub id, and much more like a folder that is here.
        raise HubError(error.what, model=label, hint=f"Did you mean '{near}'?") from error


def _looked_for(path: str, folder: Path) -> str:
    """Where a folder was looked for, and the neighbour that may have been meant."""
    near = _neighbour(path, folder)
    if near:
        return f"Did you mean '{near}'?"
    if Path(path).is_absolute() or folder == Path.cwd():
        return "Check the path."
    return f"Looked in {folder}, the recipe's folder, and in {Path.cwd()}."


def _neighbour(path: str, folder: Path) -> str:
    """The folder beside it whose name is nearest; empty where none is near."""
    wanted = folder / Path(path).expanduser()
    siblings = [p.name for p in wanted.parent.iterdir()] if wanted.parent.is_dir() else []
    near = difflib.get_close_matches(wanted.name, siblings, n=1)
    return path.removesuffix(wanted.name) + near[0] if near else ""


def fetch_weights(
    source: Source, files: Iterable[str], progress: Callable[[int], None] | None = None
) -> None:
    """Bring the named shards of a Hub model into its folder; local models have theirs."""
    if source.hub is not None:
        hub.fetch_files(source.hub, sorted(files), progress)


def _add_samples(state: hashlib._Hash, path: Path, places: int = 64, length: int = 4096) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for i in range(places):
            file.seek(max(0, size - length) * i // (places - 1))
            state.update(file.read(length))


def _open_folder(path: Path, label: str) -> Source:
    if not path.is_dir():
        hint = "Name the model's folder, not a file in it."
        raise SourceError("not a folder", model=label, hint=hint)
    names = {p.name for p in path.iterdir()}
    config = _read_config(path / "config.json", label) if "config.json" in names else {}
    index = _read_json(path / INDEX, label) if INDEX in names else None
    shards, weight_map = _shards(names, index, label)
    headers: dict[str, bytes] = {}
    tensors: dict[str, dict[str, TensorRef]] = {}
    for shard in shards:
        file = path / shard
        if not file.exists():
            raise CorruptFileError("the index names this file, but it is missing", model=label,
                                   file=shard, hint="Download or copy it again.")  # fmt: skip
        raw = read_header_file(file, label)
        headers[shard] = raw
        tensors[shard] = parse_header(raw, file, file.stat().st_size, label)
    notes = () if config else ("has no config.json",)
    return Source(label, path, config, _join(tensors, weight_map, label), headers, None, notes)


def _open_hub(repo: hub.HubModel, label: str) -> Source:
    names = {name for name in repo.files if "/" not in name}
    small = sorted(n for n in names if is_companion(n) or n in ("config.json", INDEX, CARD))
    templates = (name for name in repo.files if name.startswith("additional_chat_templates/"))
    small += sorted(name for name in templates if name.endswith(".jinja"))
    root = hub.fetch_files(repo, small)
    config = _read_config(root / "config.json", label) if "config.json" in names else {}
    index = _read_json(root / INDEX, label) if INDEX in names else None
    shards, weight_map = _shards(names, index, label)
    headers: dict[str, bytes] = {}
    tensors: dict[str, dict[str, TensorRef]] = {}
    for shard in shards:
        if shard not in repo.files:
            raise CorruptFileError("the index names this file, but the repository lacks it",
                                   model=label, file=shard)  # fmt: skip
        raw = hub.read_header(repo, shard)
        headers[shard] = raw
        cached = root / shard
        size = cached.stat().st_size if cached.exists() else repo.files[shard]
        tensors[shard] = parse_header(raw, cached, size, label)
    notes = tuple(filter(None, [repo.note, "" if config else "has no config.json"]))
    return Source(label, root, config, _join(tensors, weight_map, label), headers, repo, notes)


def _shards(names: set[str], index: Any, label: str) -> tuple[list[str], Mapping[str, str] | None]:
    """Which files hold the weights, in transformers' order of preference, and the index's map."""
    if "model.safetensors" in names:
        return ["model.safetensors"], None
    if index is not None:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFileError("has no weight_map", model=label, file=INDEX)
        checked: set[str] = set()
        for tensor, shard in weight_map.items():
            if isinstance(shard, str) and shard in checked:
                continue
            place = PurePosixPath(str(shard))
            if place.is_absolute() or ".." in place.parts or "\\" in str(shard):
                what = f"names a file outside the model's folder: '{shard}'"
                raise CorruptFileError(what, model=label, file=INDEX, tensor=tensor)
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                what = f"names a file that is not safetensors: {shard!r}"
                raise CorruptFileError(what, model=label, file=INDEX, tensor=tensor)
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
        what = "this is a LoRA adapter, not a model; this version merges models"
        raise SourceError(what, model=label, hint="Merge it into its base with PEFT first.")
    pickled = sorted(name for name in names if name.endswith(_PICKLES))
    if pickled:
        what = f"its weights are pickled ({pickled[0]}), and opening a pickle runs its code"
        convert = (
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{label}', dtype='auto').save_pretrained('converted')\""
        )
        raise SourceError(what, model=label, hint=f"If you trust it, convert it first: {convert}")
    raise SourceError("has no safetensors files", model=label, hint="Is this a model's folder?")


def _join(
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


def _read_config(path: Path, label: str) -> dict[str, Any]:
    config = _read_json(path, label)
    if not isinstance(config, dict):
        raise CorruptFileError("is not a mapping", model=label, file=path.name)
    return config


def _read_json(path: Path, label: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"cannot be read: {error}", model=label, file=path.name) from None
