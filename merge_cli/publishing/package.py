"""Collecting what is uploaded of a merged model: its files, and the card."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import CARD, refuse_links
from merge_cli.checkpoint.cards import front_matter
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.report.card import card_for
from merge_cli.sources.storage import INDEX
from merge_cli.system.paths import require_names
from merge_cli.system.untrusted import Unreadable, read_mapping, read_text

REPORT = "merge_report.json"
RECIPE = "merge_recipe.yaml"
EVALUATION = "merge_evaluation.json"
_SKIPPED = frozenset(("__pycache__",))


@dataclass(frozen=True)
class Package:
    """A merged model, ready to be uploaded.

    Attributes:
        files: name in the repository -> size in bytes, sorted; the card's is `card`'s.
        card: README.md as it is uploaded.
        notes: for the user who uploads it.
    """

    folder: Path
    files: dict[str, int]
    card: str
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def content(self, name: str) -> Path | bytes:
        """A file's path, or its bytes."""
        return self.card.encode() if name == CARD else self.folder / name


def pack(folder: Path, repo_id: str = "") -> Package:
    """Collect and check the files of a merged model; reads no weights.

    Args:
        repo_id: the repository on the Hub, which the card's example loads; empty leaves the card.

    Raises:
        SourceError: not a finished merge.
        CorruptFileError: a shard that the index names is missing, or a card that has no metadata.
    """
    label = str(folder)
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.partial").is_dir()
        message = "this merge is not finished" if unfinished else "no such folder"
        hint = "Run the same merge-cli run again: it resumes." if unfinished else "Check the path."
        raise SourceError(message, model=label, hint=hint)
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not _is_private(path.relative_to(folder))
    )
    require_names(names, label)
    refuse_links([folder / name for name in names], folder, label)
    if REPORT not in names or not any(name.endswith(".safetensors") for name in names):
        message = "is not a model that merge-cli has merged"
        hint = f"It has no {REPORT} or no weights. Other folders are uploaded by: hf upload."
        raise SourceError(message, model=label, hint=hint)
    _check_shards(folder, names)
    if CARD not in names:
        message = f"has no {CARD}, the model card"
        raise CorruptFileError(message, model=label, hint="Merge again, or write one.")
    try:
        card = read_text(folder / CARD)
        card = card_for(card, repo_id) if repo_id else card
    except Unreadable as error:
        raise CorruptFileError(str(error), model=label, file=CARD) from None
    if not front_matter(card):
        message = (
            "begins with no metadata that can be read (a block of YAML between two lines of ---)"
        )
        hint = "Restore it: the Hub reads licence, base models and tags there."
        raise CorruptFileError(message, model=label, file=CARD, hint=hint)
    files = {name: (folder / name).stat().st_size for name in names}
    files[CARD] = len(card.encode())
    return Package(folder, files, card, tuple(_notes(folder, card)))


def _is_private(path: Path) -> bool:
    """Whether it is a hidden file, or a cache of Python's."""
    return any(part.startswith(".") or part in _SKIPPED for part in path.parts)


def _check_shards(folder: Path, names: list[str]) -> None:
    if INDEX not in names:
        return
    weight_map = read_mapping(folder / INDEX, str(folder)).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    listed_shards = {shard for shard in shards if isinstance(shard, str)}
    if not all(isinstance(shard, str) for shard in shards):
        message = "does not say which file each tensor is in"
        raise CorruptFileError(message, model=str(folder), file=INDEX)
    missing = sorted(listed_shards - set(names))
    if missing:
        message = f"{len(missing)} of the files that the index names are missing: {missing[0]}"
        hint = "Merge again: --overwrite."
        raise CorruptFileError(message, model=str(folder), file=INDEX, hint=hint)


def _notes(folder: Path, card: str) -> list[str]:
    notes = []
    data = front_matter(card)
    if not data.get("license"):
        notes.append(
            "the card states no licence: the sources do not agree on one, or state none; "
            f"say it in {CARD}, or in the recipe's metadata"
        )
    local = _local_models(folder)
    if local:
        notes.append(
            f"{RECIPE} and {REPORT} name local folders ({', '.join(local)}): others can read "
            "these names, and cannot run that recipe"
        )
    paths = _evaluated_paths(folder)
    if paths:
        notes.append(f"{EVALUATION} names folders of this machine ({', '.join(paths)})")
    return notes


def _evaluated_paths(folder: Path) -> list[str]:
    """The absolute paths by which its evaluation names models."""
    if not (folder / EVALUATION).is_file():
        return []
    models = read_mapping(folder / EVALUATION, str(folder)).get("models")
    named = [model.get("model") for model in models or () if isinstance(model, dict)]
    return [name for name in named if isinstance(name, str) and Path(name).is_absolute()]


def _is_local(entry: Mapping[str, Any]) -> bool:
    """Whether a source of a report, or the adapter that was applied to it, is a folder."""
    adapter = str(entry["model"]).partition("+")[2]
    return not entry.get("revision") or adapter.startswith((".", "/", "~"))


def _local_models(folder: Path) -> list[str]:
    """The sources without a commit in the report, as it names them; also those of its stages."""
    report = read_mapping(folder / REPORT, str(folder))
    inputs, stages = report.get("inputs"), report.get("stages") or []
    if isinstance(stages, list) and isinstance(inputs, list):
        made = [stage for stage in stages if isinstance(stage, dict)]
        names = [stage.get("name") for stage in made]
        all_inputs = [*inputs, *(entry for stage in made for entry in stage.get("inputs") or ())]
        inputs = [e for e in all_inputs if not isinstance(e, dict) or not _is_made(e, names)]
    if not isinstance(inputs, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("model"), str) for entry in inputs
    ):
        message = "is not a report of merge-cli: it does not list its inputs"
        raise CorruptFileError(message, model=str(folder), file=REPORT)
    return list(dict.fromkeys(entry["model"] for entry in inputs if _is_local(entry)))


def _is_made(entry: Mapping[str, Any], stages: Collection[Any]) -> bool:
    """Whether a source is what another document of the same recipe makes, or comes with OUT."""
    model = entry.get("model")
    return model in stages or str(model).startswith("./stages/")
