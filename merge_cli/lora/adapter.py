"""Opening a LoRA adapter, a folder, a Hub repository or an address, and sorting its tensors.

An adapter is a config and one weights file. Its tensors are LoRA factors of a module, or they
replace a tensor of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.fingerprint import FileFingerprint, folder_fingerprints
from merge_cli.checkpoint.headers import TensorRef, parse_header, read_header_file
from merge_cli.checkpoint.repository import Repository
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import SourceError
from merge_cli.hub import models as hub
from merge_cli.lora.config import CONFIG, read_config
from merge_cli.recipe.reference import ModelRef, hub_id, is_address, local_folder
from merge_cli.system.paths import require_text

if TYPE_CHECKING:
    from merge_cli.remote.models import RemoteModel

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
LAYER_FACTORS = ("a", "b")
EMBEDDING_FACTORS = ("embedding_a", "embedding_b")
Parts = dict[str, TensorRef]
_FLOATS = f"{', '.join(MERGEABLE[:-1])} or {MERGEABLE[-1]}"


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    Attributes:
        root: its folder; a Hub adapter's weights may not be in it yet.
        fingerprint: of its weights: size and time, or the Hub's commit.
        fingerprints: of its files before they were read; none of an adapter on the Hub.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    header: bytes
    fingerprint: str
    hub: hub.HubModel | None = None
    fingerprints: Mapping[Path, FileFingerprint] = field(default_factory=dict, repr=False)
    remote: RemoteModel | None = None

    @property
    def repository(self) -> Repository | None:
        """Where its files are fetched from; None for those on disk."""
        return self.hub or self.remote


def open_adapter(path: str, revision: str | None, folder: Path, label: str) -> Adapter:
    """Find an adapter and read its config and header.

    Args:
        folder: where relative paths start.
        label: the model with the adapter, for messages.

    Raises:
        SourceError: missing, or not an adapter; a kind of adapter that is not applied.
        CorruptFileError: a config or header that is damaged.
        HubError: a repository that cannot be reached.
    """
    if is_address(path):
        from merge_cli.remote.models import open_remote

        remote = open_remote(path)
        return replace(_open_elsewhere(remote, label), remote=remote)
    root = local_folder(path, folder)
    repository = hub_id(path)
    if root is None and repository is None:
        hint = f"Looked in {folder} and in {Path.cwd()}."
        raise SourceError(f"no such adapter folder: {path}", model=label, hint=hint)
    if root is None and repository is not None:
        model = hub.open_hub(repository, revision)
        return replace(_open_elsewhere(model, label), hub=model)
    assert root is not None
    require_text(root)
    if revision:
        hint = "Remove the part after '@'."
        raise SourceError(f"a folder has no revision '{revision}'", model=label, hint=hint)
    names = {item.name for item in root.iterdir()} if root.is_dir() else set()
    _require_files(names, label, path)
    fingerprints = folder_fingerprints(root)
    file = root / WEIGHTS
    raw = read_header_file(file, label)
    status = file.stat()
    tensors = parse_header(raw, file, status.st_size, label)
    fingerprint = f"{status.st_size} {status.st_mtime_ns}"
    config = read_config(root / CONFIG, label)
    return Adapter(root, config, tensors, raw, fingerprint, fingerprints=fingerprints)


def open_alone(reference: ModelRef, folder: Path) -> Adapter:
    """The adapter that a recipe names, with or without a model, which is not looked at.

    Args:
        folder: where relative paths start.

    Raises:
        as `open_adapter`.
    """
    path, revision = reference.path, reference.revision
    if reference.lora:
        path, revision = reference.lora, reference.lora_revision
    return open_adapter(path, revision, folder, str(reference))


def _open_elsewhere(repo: Repository, label: str) -> Adapter:
    _require_files(set(repo.files), label, repo.repo_id)
    root = repo.fetch([CONFIG, *([CARD] if CARD in repo.files else [])])
    raw = repo.read_header(WEIGHTS)
    tensors = parse_header(raw, root / WEIGHTS, repo.files[WEIGHTS], label)
    return Adapter(root, read_config(root / CONFIG, label), tensors, raw, str(repo.commit))


def _require_files(names: set[str], label: str, path: str) -> None:
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


@dataclass(frozen=True)
class AdapterContents:
    """An adapter's tensors, sorted out.

    Attributes:
        modules: LoRA factors by module.
        replacements: tensors that replace the model's, by name.
        duplicates: names that more than one of its tensors has.
    """

    modules: dict[str, Parts]
    replacements: Parts
    duplicates: tuple[str, ...] = ()


def sort_contents(stored: Mapping[str, TensorRef]) -> AdapterContents:
    """Factors by module, and tensors that replace the model's, by name."""
    modules: dict[str, Parts] = {}
    replacements: Parts = {}
    priorities: dict[str, int] = {}
    duplicates = []
    for name, ref in stored.items():
        module_name = name.removeprefix(PREFIX)
        for ending, role in _FACTORS.items():
            if module_name.endswith(f".{ending}"):
                parts = modules.setdefault(module_name.removesuffix(f".{ending}"), {})
                duplicates += [name] if role in parts else []
                parts[role] = ref
                break
        else:
            priority = _priority(module_name)
            for wrapper in _WRAPPERS:
                module_name = module_name.replace(wrapper, "")
            if module_name in replacements and priority != priorities[module_name]:
                if priority > priorities[module_name]:
                    continue
            elif module_name in replacements:
                duplicates.append(name)
            replacements[module_name], priorities[module_name] = ref, priority
    return AdapterContents(modules, replacements, tuple(duplicates))


def unreadable_factors(modules: Mapping[str, Parts]) -> Iterator[tuple[str, str]]:
    """The first factor, magnitude or bias of a factor that is no floats, and why not."""
    stored = (ref for parts in modules.values() for ref in parts.values())
    unreadable = [ref for ref in stored if ref.dtype not in MERGEABLE]
    if unreadable:
        first, count = unreadable[0], len(unreadable) - 1
        others = f"; so {'are' if count > 1 else 'is'} {count} more" if count else ""
        yield first.name, f"it is stored as {first.dtype}, not as {_FLOATS}{others}"


def why_no_replacement(ref: TensorRef, replaced: Tensor | None) -> str:
    """Why a tensor's dtype cannot stand in a model; empty where it can.

    Args:
        replaced: the model's tensor; None where the adapter brings a new one.
    """
    if ref.dtype in MERGEABLE and (replaced is None or replaced.dtype in MERGEABLE):
        return ""
    if replaced is not None and ref.dtype == replaced.dtype:
        return ""  # a counter or a mask, as the model has it
    accepted = _FLOATS
    if replaced is not None and replaced.dtype not in MERGEABLE:
        accepted = f"{replaced.dtype}, as in the model"
    return f"it is stored as {ref.dtype}, not as {accepted}"


def _priority(name: str) -> int:
    """Which of the tensors of one name counts: the one with the least number.

    Of a resized embedding PEFT saves the trained copy by its plain name, and everything that its
    wrapper holds once more: that copy, and the one that is not trained.
    """
    if ".original_module." in name:
        return 2
    return 1 if ".modules_to_save." in name else 0
