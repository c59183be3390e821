"""Opening a LoRA adapter: a folder, or a repository on the Hub, with a config and one file.

An adapter's tensors, sorted out: factors by module, and what replaces the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.checkpoint.fingerprint import FileFingerprint, folder_fingerprints
from merge_cli.checkpoint.headers import TensorRef, parse_header, read_header_file
from merge_cli.errors import SourceError
from merge_cli.hub import models as hub
from merge_cli.lora.config import CONFIG, read_config
from merge_cli.recipe.reference import hub_id, local_folder


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    Attributes:
        root: its folder; a Hub adapter's weights may not be in it yet.
        stamp: tells its weights apart from others at their place.
        stamps: its files as they were before they were read; none of an adapter on the Hub.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    header: bytes
    stamp: str
    hub: hub.HubModel | None = None
    stamps: Mapping[Path, FileFingerprint] = field(default_factory=dict, repr=False)


def open_adapter(path: str, revision: str | None, folder: Path, label: str) -> Adapter:
    """Find an adapter and read its config and header.

    Args:
        folder: where relative paths start.
        label: the model with the adapter, for messages.

    Raises:
        SourceError: missing, or none; a kind of adapter that is not applied.
        CorruptFileError: a config or header that does not hold.
        HubError: a repository that cannot be had.
    """
    place = local_folder(path, folder)
    repository = hub_id(path)
    if place is None and repository is None:
        hint = f"Looked in {folder} and in {Path.cwd()}."
        raise SourceError(f"no such adapter folder: {path}", model=label, hint=hint)
    if place is None and repository is not None:
        return _on_hub(hub.open_hub(repository, revision), label)
    assert place is not None
    if revision:
        hint = "Remove the part after '@'."
        raise SourceError(f"a folder has no revision '{revision}'", model=label, hint=hint)
    names = {item.name for item in place.iterdir()} if place.is_dir() else set()
    _need(names, label, path)
    stamps = folder_fingerprints(place)
    file = place / WEIGHTS
    raw = read_header_file(file, label)
    about = file.stat()
    tensors = parse_header(raw, file, about.st_size, label)
    stamp = f"{about.st_size} {about.st_mtime_ns}"
    config = read_config(place / CONFIG, label)
    return Adapter(place, config, tensors, raw, stamp, stamps=stamps)


def _on_hub(repo: hub.HubModel, label: str) -> Adapter:
    _need(set(repo.files), label, repo.repo_id)
    root = hub.fetch_files(repo, [CONFIG, *([CARD] if CARD in repo.files else [])])
    raw = hub.read_header(repo, WEIGHTS)
    tensors = parse_header(raw, root / WEIGHTS, repo.files[WEIGHTS], label)
    return Adapter(root, read_config(root / CONFIG, label), tensors, raw, str(repo.commit), repo)


def _need(names: set[str], label: str, path: str) -> None:
    if CONFIG not in names:
        message = f"{path} is no adapter: it has no {CONFIG}"
        raise SourceError(message, model=label, hint="Name the folder that PEFT saved.")
    if WEIGHTS not in names:
        pickled = "adapter_model.bin" in names
        message = f"{path} has no {WEIGHTS}"
        if pickled:
            message = f"the weights of {path} are pickled, and opening a pickle runs its code"
        hint = "Load it with PEFT, if you trust it, and save it again." if pickled else ""
        raise SourceError(message, model=label, hint=hint)


WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}
# Names of PEFT's wrappers: today's, and those of version 0.4 and before.
_WRAPPERS = (".base_layer", ".modules_to_save.default", ".modules_to_save", ".original_module")
Parts = dict[str, TensorRef]


@dataclass(frozen=True)
class AdapterContents:
    """An adapter's tensors, sorted out.

    Attributes:
        modules: factors by module.
        whole: tensors that replace the model's, by name.
        twice: names that several of its tensors have.
    """

    modules: dict[str, Parts]
    whole: Parts
    twice: tuple[str, ...] = ()


def sort_contents(stored: Mapping[str, TensorRef]) -> AdapterContents:
    """Factors by module, and tensors that replace the model's, by name."""
    modules: dict[str, Parts] = {}
    whole: Parts = {}
    ranks: dict[str, int] = {}
    twice = []
    for name, ref in stored.items():
        plain = name.removeprefix(PREFIX)
        for ending, part in _FACTORS.items():
            if plain.endswith(f".{ending}"):
                parts = modules.setdefault(plain.removesuffix(f".{ending}"), {})
                twice += [name] if part in parts else []
                parts[part] = ref
                break
        else:
            rank = _rank(plain)
            for wrapper in _WRAPPERS:
                plain = plain.replace(wrapper, "")
            if plain in whole and rank != ranks[plain]:
                if rank > ranks[plain]:
                    continue
            elif plain in whole:
                twice.append(name)
            whole[plain], ranks[plain] = ref, rank
    return AdapterContents(modules, whole, tuple(twice))


def _rank(name: str) -> int:
    """Which of a module's tensors counts, the least first.

    Of a resized embedding PEFT saves the trained copy by its plain name, and everything that its
    wrapper holds once more: that copy, and the one that is not trained.
    """
    if ".original_module." in name:
        return 2
    return 1 if ".modules_to_save." in name else 0
