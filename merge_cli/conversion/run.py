"""Converting a model to safetensors: pickled weights file by file, others by the engine.

    pytorch_model-00001-of-2.bin ─▶ child process ─▶ OUT.partial/model/model-00001-of-2.safetensors
    ...                                              config, tokenizer, index  ─▶  OUT

How a pickle is opened says `pickles`. GGUF files and distributed checkpoints are sources that the
engine reads: `streamed`. Models are written as GGUF files by `gguf_file`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import copy_companions, copy_inside
from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.fingerprint import folder_fingerprints
from merge_cli.checkpoint.headers import parse_header, read_header_file
from merge_cli.conversion.gguf_file import write_gguf
from merge_cli.conversion.pickles import PickleJob, convert_all, find_pickles
from merge_cli.conversion.streamed import convert_streamed, is_streamed
from merge_cli.engine.inputs import Inputs
from merge_cli.engine.output import OutputWorkspace
from merge_cli.errors import Interrupted, UsageError
from merge_cli.formats.endings import GGUF
from merge_cli.options import MergeOptions, OnProgress, ignore_progress
from merge_cli.sources.storage import INDEX
from merge_cli.system.json_text import indented
from merge_cli.system.libraries import library_version, missing
from merge_cli.system.raw_io import write_error
from merge_cli.system.records import Records
from merge_cli.system.untrusted import read_mapping

_FORMAT = 1


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
    if out.suffix.lower() == GGUF:
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
                job = PickleJob(model, work.model, max_memory, copies, work.lock)
                entries = convert_all(job, files, records, on_progress)
            finally:
                records.close()
            _clear(work.model, entries)
            copy_companions(root, root, work.model)
            if (root / "config.json").is_file():
                copy_inside(root / "config.json", root, work.model / "config.json")
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


def _config(root: Path, model: str) -> dict[str, Any]:
    file = root / "config.json"
    return read_mapping(file, model) if file.exists() else {}


def _untied(config: Mapping[str, Any]) -> bool:
    """Whether the config says that head and embedding are separate."""
    return (
        text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings")) is False
    )


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
        (folder / INDEX).write_text(indented(document, ensure_ascii=True) + "\n", encoding="utf-8")
    tied = tuple(sorted({name for entry in entries for name in entry["tied"]}))
    left_out = tuple(sorted({name for entry in entries for name in entry["left_out"]}))
    return len(weight_map), size, tied, left_out
