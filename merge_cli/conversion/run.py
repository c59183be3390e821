"""Converting a model to safetensors: pickled weights here, file by file, others by the engine.

    pytorch_model-00001-of-2.bin ─▶ child process ─▶ OUT.partial/model/model-00001-of-2.safetensors
    ...                                              config, tokenizer, index  ─▶  OUT

Opening a pickle can run any code. So each is opened in a separate process with limited memory, by
torch's unpickler, which only builds tensors. A finished file is not converted again.

GGUF files and distributed checkpoints are sources that the engine reads: `streamed`. Models are
written as GGUF files by `gguf_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import copy_companions
from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.fingerprint import folder_fingerprints
from merge_cli.checkpoint.headers import parse_header, read_header_file
from merge_cli.conversion.gguf_file import write_gguf
from merge_cli.conversion.streamed import convert_streamed, is_streamed
from merge_cli.engine.inputs import Inputs
from merge_cli.engine.output import OutputWorkspace
from merge_cli.errors import CorruptFileError, Interrupted, ResourceError, SourceError, UsageError
from merge_cli.formats.pickled import PICKLES
from merge_cli.hub import models as hub
from merge_cli.options import MergeOptions, OnProgress, Progress, ignore_progress
from merge_cli.recipe.reference import hub_id, local_folder, parse_reference
from merge_cli.sources.gguf import SUFFIX
from merge_cli.sources.storage import INDEX
from merge_cli.system.libraries import library_version, missing
from merge_cli.system.processes import child
from merge_cli.system.raw_io import write_error
from merge_cli.system.records import Records
from merge_cli.system.untrusted import read_mapping

_INDEX_OF_PICKLES = "pytorch_model.bin.index.json"
_FORMAT = 1
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "trainer_state", "scaler")


@dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
        tied: names of tensors that shared another one's memory; the config ties them.
        left_out: names of what was in the files besides tensors.
        notes: what a reader should know, one line each.
    """

    path: Path
    tensors: int
    bytes: int
    tied: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(
    model: str,
    out: Path,
    *,
    dtype: str = "",
    config: str = "",
    max_memory: int = 0,
    overwrite: bool = False,
    fresh: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Converted:
    """Convert a model to safetensors.

    Args:
        model: a folder, a GGUF file, or a Hub id@revision.
        out: the folder to write, or a GGUF file.
        dtype: torch's name of the output's dtype, of what the engine reads; empty for its own. For
            a GGUF file also `q8_0`.
        config: a model whose config and tokenizer the output has, of a distributed checkpoint.
        max_memory: bytes that a process may use beyond its libraries; 0 for twice the file it
            opens and a gigabyte.
        overwrite: replace OUT, if it is a model.
        fresh: discard the working files of an earlier command for OUT.

    Raises:
        UsageError: OUT exists, holds the model, or has unfinished work of another command.
        SourceError: no pickles, a pickle with more than tensors, or one that has changed.
        ResourceError: the disk is full, memory ran out, another process writes to OUT; no torch.
        Interrupted: the same call resumes.
    """
    if out.suffix == SUFFIX:
        if config or fresh:
            flag = "--config" if config else "--fresh"
            raise UsageError(f"{flag} is not for writing a GGUF file", where=str(out))
        return Converted(
            out, *write_gguf(model, out, kind=dtype, overwrite=overwrite, on_progress=on_progress)
        )
    if is_streamed(model):
        written = convert_streamed(
            model,
            out,
            dtype=dtype,
            config=config,
            options=MergeOptions(overwrite=overwrite, fresh=fresh, statistics=False),
            on_progress=on_progress,
        )
        return Converted(out, len(written.plan.tasks), written.bytes, (), (), written.notes)
    if dtype or config:
        flag = "--dtype" if dtype else "--config"
        message = f"{flag} is for GGUF files and distributed checkpoints"
        raise UsageError(message, where=model, hint="Pickled weights are written as they are.")
    if library_version("torch") is None:  # a process of its own imports it
        raise missing("torch", "converting pickles")
    try:
        with OutputWorkspace(out, "conversion") as work:
            if not overwrite:
                work.refuse(False, [])  # before anything is fetched
            root, files = find_pickles(model, on_progress)
            work.refuse(overwrite, [root, *files])
            settings = _config(root, model)
            inputs = Inputs(
                [(model, root, folder_fingerprints(root))], [(model, file) for file in files]
            )
            copies = "keep" if _untied(settings) else "leave"
            key = _key(root, files, copies, inputs)
            if fresh:
                work.discard()
            work.refuse_other_work(key)
            work.begin(key, inputs.fingerprint)
            records = Records(work.journal, key, inputs.fingerprint)
            try:
                job = _Job(model, work.model, max_memory, copies, work.lock)
                entries = _convert_all(job, files, records, on_progress)
            finally:
                records.close()
            _clear(work.model, entries)
            copy_companions(root, root, work.model)
            if (root / "config.json").is_file():
                shutil.copyfile(root / "config.json", work.model / "config.json")
            totals = _finish(entries, work.model)
            inputs.verify_or(work.discard)
            work.publish()
    except OSError as error:
        raise write_error(error, out) from error
    except KeyboardInterrupt:
        hint = "The same command resumes."
        raise Interrupted("stopped", where=f"{out}.partial", hint=hint) from None
    return Converted(out, *totals)


def _key(root: Path, files: Sequence[Path], copies: str, inputs: Inputs) -> str:
    """A fingerprint of everything that the output depends on."""
    names = [file.relative_to(root).as_posix() for file in files]
    settings = [
        _FORMAT,
        version("merge-cli"),
        library_version("torch"),
        str(root.resolve()),
        names,
        copies,
    ]
    return hashlib.sha256(repr((settings, inputs.content_fingerprint)).encode()).hexdigest()


def find_pickles(model: str, on_progress: OnProgress) -> tuple[Path, list[Path]]:
    """The model's folder and its pickled files, as its index lists them.

    Raises:
        SourceError: no folder, no pickled weights in it, or an index with missing files.
    """
    folder = local_folder(model, Path.cwd())
    if folder is None:
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


def _config(root: Path, model: str) -> dict[str, Any]:
    file = root / "config.json"
    return read_mapping(file, model) if file.exists() else {}


def _untied(config: Mapping[str, Any]) -> bool:
    """Whether the config says that head and embedding are separate."""
    return (
        text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings")) is False
    )


@dataclass(frozen=True)
class _Job:
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


def _convert_all(
    job: _Job, files: Sequence[Path], records: Records, on_progress: OnProgress
) -> list[Mapping[str, Any]]:
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


def _in_a_process(job: _Job, file: Path, target: Path, seen: Sequence[str]) -> dict[str, Any]:
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
            message = f"{file.name} needs more memory than {limit / 1e9:.1f} GB"
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


def _clear(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Remove what an earlier run has left besides the weights."""
    names = {entry["file"] for entry in entries}
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


def _finish(
    entries: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    """Write the index, and add up what was written."""
    weight_map = {name: entry["file"] for entry in entries for name in entry["tensors"]}
    size = 0
    for entry in entries:
        file = folder / entry["file"]
        tensors = parse_header(read_header_file(file, ""), file, file.stat().st_size, "")
        size += sum(ref.nbytes for ref in tensors.values())
    if len(entries) > 1:
        ordered = dict(sorted(weight_map.items()))
        document = {"metadata": {"total_size": size}, "weight_map": ordered}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tied = tuple(sorted({name for entry in entries for name in entry["tied"]}))
    left_out = tuple(sorted({name for entry in entries for name in entry["left_out"]}))
    return len(weight_map), size, tied, left_out
