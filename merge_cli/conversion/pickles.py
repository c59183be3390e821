"""Pickled weights to safetensors, file by file, each in a process of its own.

Opening a pickle can run any code. So each is opened in a separate process with limited memory, by
torch's unpickler, which only builds tensors. A finished file is not converted again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.headers import parse_header, read_header_file
from merge_cli.errors import CorruptFileError, ResourceError, SourceError
from merge_cli.formats.endings import PICKLES
from merge_cli.hub import models as hub
from merge_cli.options import OnProgress, Progress
from merge_cli.recipe.reference import hub_id, local_folder, parse_reference
from merge_cli.system.machine import show_size
from merge_cli.system.paths import require_names, require_text
from merge_cli.system.processes import child
from merge_cli.system.raw_io import write_error
from merge_cli.system.records import Records
from merge_cli.system.untrusted import read_mapping

_INDEX_OF_PICKLES = "pytorch_model.bin.index.json"
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "trainer_state", "scaler")


def find_pickles(model: str, on_progress: OnProgress) -> tuple[Path, list[Path]]:
    """The model's folder and its pickled files, as its index lists them.

    Raises:
        SourceError: no folder, no pickled weights in it, or an index with missing files.
    """
    folder = local_folder(model, Path.cwd())
    if folder is not None:
        require_text(folder)
    else:
        reference = parse_reference(model, Path.cwd())
        repository = hub_id(reference.path)
        if repository is None:
            raise SourceError("no such folder", model=model)
        repo = hub.open_hub(repository, reference.revision)
        requested = [n for n in repo.files if "/" not in n and not n.endswith(".safetensors")]
        total = sum(repo.files[name] for name in requested)
        fetched = 0

        def progress(count: int) -> None:
            nonlocal fetched
            fetched += count
            on_progress(Progress("fetch", fetched, total, model))

        folder = repo.fetch(requested, progress)
    if not folder.is_dir():
        hint = "Name the model's folder, not a file in it."
        raise SourceError("not a folder", model=model, hint=hint)
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", model=model) from None
    if _INDEX_OF_PICKLES in names:
        return folder, [folder / name for name in _listed(folder, names, model)]
    pickles = [n for n in names if n.endswith(PICKLES) and not n.startswith(_NO_WEIGHTS)]
    require_names(pickles, model)
    if not pickles:
        safe = any(name.endswith(".safetensors") for name in names)
        hint = "It has safetensors already: nothing needs converting." if safe else ""
        raise SourceError("has no pickled weights", model=model, hint=hint)
    return folder, [folder / name for name in pickles]


def _listed(folder: Path, names: Sequence[str], model: str) -> list[str]:
    """The files that the index lists."""
    weight_map = read_mapping(folder / _INDEX_OF_PICKLES, model).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError("has no weight_map", model=model, file=_INDEX_OF_PICKLES)
    listed = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
    missing = sorted(name for name in listed if name not in names)
    if missing:
        raise SourceError("its index names a file that is not here", model=model, file=missing[0])
    return sorted(listed)


@dataclass(frozen=True)
class PickleJob:
    """Settings for every file.

    Attributes:
        folder: where the results go.
        lock: a descriptor that the child keeps open: the workspace is locked while it runs.
    """

    model: str
    folder: Path
    max_memory: int
    copies: str
    lock: int


def convert_all(
    job: PickleJob, files: Sequence[Path], records: Records, on_progress: OnProgress
) -> list[Mapping[str, Any]]:
    """Convert the files that are not converted yet.

    Args:
        records: of those that are; each finished one is added.

    Returns:
        an entry for each file: its name, its tensors, and what was tied or left out.

    Raises:
        SourceError: a file that cannot be opened, or holds more than tensors.
        ResourceError: memory or disk ran out.
    """
    total = sum(file.stat().st_size for file in files)
    recorded = {str(record.get("file")): record for record in records.entries}
    done, seen = 0, list[str]()
    entries: list[Mapping[str, Any]] = []
    for number, file in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        on_progress(Progress("convert", done, total, file.name))
        answer = recorded.get(name)
        if answer is None or not _is_complete(job.folder / name, answer):
            outcome = _in_a_process(job, file, job.folder / name, seen)
            answer = {"file": name, **outcome}
            records.append(answer)
        seen += [*answer["tensors"], *answer["tied"]]
        entries.append(answer)
        done += file.stat().st_size
        on_progress(Progress("convert", done, total, file.name))
    return entries


def _in_a_process(job: PickleJob, file: Path, target: Path, seen: Sequence[str]) -> dict[str, Any]:
    limit = job.max_memory or 2 * file.stat().st_size + 2**30
    arguments = [str(file), str(target), str(limit), job.copies]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with child(
        "merge_cli.conversion.child", arguments, inherited=[job.lock], text=True, **pipes
    ) as process:
        output, errors = process.communicate(json.dumps(list(seen)))
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        if "memory" in last.lower() or process.returncode < 0:
            message = f"{file.name} needs more memory than {show_size(limit)}"
            raise ResourceError(message, hint="Give it more with --max-memory.") from None
        message = f"cannot be converted: {last}"
        raise SourceError(message, model=job.model, file=file.name) from None
    if "unwritten" in answer:
        number = int(answer["unwritten"])
        raise write_error(OSError(number, os.strerror(number)), target)
    if "error" not in answer:
        return answer
    message, hint = f"cannot be opened: {answer['error']}", ""
    if answer["unsafe"]:
        message = "holds more than tensors, and opening it would run its code"
        hint = "Do not open it, unless you trust who made it: then load and save it with torch."
    raise SourceError(message, model=job.model, file=file.name, hint=hint)


def _is_complete(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file exists with the tensors of its record."""
    try:
        tensors = parse_header(read_header_file(file, ""), file, file.stat().st_size, "")
    except (OSError, SourceError):
        return False
    return tensors.keys() == set(entry["tensors"])
