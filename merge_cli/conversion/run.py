"""A model with pickled weights to a folder with safetensors, file by file.

    pytorch_model-00001-of-2.bin ─▶ child process ─▶ OUT.partial/model-00001-of-00002.safetensors
    ...                                              config, tokenizer, index  ─▶  OUT

Opening a pickle can run any code, so each is opened in a process of its own, by torch's unpickler
that builds tensors alone, with a limit on memory. A file that is finished is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.checkpoint import hub
from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.files import copy_companions
from merge_cli.checkpoint.header import parse_header, read_header_file
from merge_cli.checkpoint.raw import write_error
from merge_cli.checkpoint.shards import INDEX
from merge_cli.engine.beside import folder_beside, lock_folder
from merge_cli.engine.options import Progress
from merge_cli.errors import Interrupted, ResourceError, SourceError, UsageError
from merge_cli.recipe.reference import hub_id, local_folder, parse_reference

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "trainer_state", "scaler")
Show = Callable[[Progress], None]


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        tied: names that were another tensor's memory, and are left to the config.
        left_out: what was in the files besides tensors.
    """

    path: Path
    tensors: int
    bytes: int
    tied: tuple[str, ...]
    left_out: tuple[str, ...]


def convert(
    model: str, out: Path, *, max_memory: int = 0, overwrite: bool = False,
    show: Show = lambda progress: None,
) -> Converted:  # fmt: skip
    """Convert a model.

    Args:
        model: a folder, or a Hub id@revision.
        max_memory: bytes that a process may use beyond its libraries; 0 for twice the file it
            opens and a gigabyte.
        overwrite: replace OUT.

    Raises:
        UsageError: OUT exists, or is the model itself.
        SourceError: no pickles, or one that holds anything but tensors.
        ResourceError: the disk is full, memory ran out.
        Interrupted: the same call goes on.
    """
    root, files = _find(model, show)
    if out.exists() and not overwrite:
        raise UsageError("exists already", where=str(out), hint="Choose another, or --overwrite.")
    if out.exists() and out.resolve() == root.resolve():
        raise UsageError("the output would replace the model", where=str(out))
    partial = folder_beside(out, ".partial")
    lock = lock_folder(partial, "conversion")
    try:
        copies = "keep" if _untied(root) else "leave"
        found = _convert_all(model, files, partial, max_memory, copies, show)
        copy_companions(root, root, partial)
        if (root / "config.json").is_file():
            shutil.copyfile(root / "config.json", partial / "config.json")
        result = _finish(found, partial)
        (partial / "lock").unlink(missing_ok=True)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise write_error(error, partial) from error
    except KeyboardInterrupt:
        hint = "The same command goes on."
        raise Interrupted("stopped", where=str(partial), hint=hint) from None
    finally:
        _close(lock)
    return Converted(out, *result)


def _find(model: str, show: Show) -> tuple[Path, list[Path]]:
    """The model's folder and its pickled files, as its index lists them."""
    place = local_folder(model, Path.cwd())
    if place is None:
        reference = parse_reference(model, Path.cwd())
        repository = hub_id(reference.path)
        if repository is None:
            raise SourceError("no such folder", model=model)
        repo = hub.open_hub(repository, reference.revision)
        wanted = [n for n in repo.files if "/" not in n and not n.endswith(".safetensors")]
        total = sum(repo.files[name] for name in wanted)
        fetched = 0

        def progress(count: int) -> None:
            nonlocal fetched
            fetched += count
            show(Progress("fetch", fetched, total, model))

        place = hub.fetch_files(repo, wanted, progress)
    names = sorted(p.name for p in place.iterdir() if p.is_file())
    index = place / "pytorch_model.bin.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map") or {}
        found = sorted({str(name) for name in listed.values()})
        odd = [name for name in found if "/" in name or name not in names]
        if odd:
            raise SourceError("its index names a file that is not here", model=model, file=odd[0])
        return place, [place / name for name in found]
    found = [n for n in names if n.endswith(_PICKLES) and not n.startswith(_NO_WEIGHTS)]
    if not found:
        safe = any(name.endswith(".safetensors") for name in names)
        hint = "It has safetensors already: nothing needs converting." if safe else ""
        raise SourceError("has no pickled weights", model=model, hint=hint)
    return place, [place / name for name in found]


def _untied(root: Path) -> bool:
    """Whether the config says that head and embedding are two, however they were stored."""
    file = root / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return (
        text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings")) is False
    )


def _convert_all(
    model: str, files: Sequence[Path], partial: Path, max_memory: int, copies: str, show: Show
) -> list[Mapping[str, Any]]:
    total = sum(file.stat().st_size for file in files)
    done, seen = 0, list[str]()
    found: list[Mapping[str, Any]] = []
    for number, file in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        target, record = partial / name, partial / f"{name}.json"
        show(Progress("convert", done, total, file.name))
        if not (target.is_file() and record.is_file()):
            answer = _in_a_process(model, file, target, max_memory, seen, copies)
            record.write_text(json.dumps(answer), encoding="utf-8")
        answer = json.loads(record.read_text(encoding="utf-8"))
        seen += [*answer["tensors"], *answer["tied"]]
        found.append({**answer, "file": name})
        done += file.stat().st_size
        show(Progress("convert", done, total, file.name))
    return found


def _in_a_process(
    model: str, file: Path, target: Path, max_memory: int, seen: Sequence[str], copies: str
) -> dict[str, Any]:
    limit = max_memory or 2 * file.stat().st_size + 2**30
    command = [sys.executable, "-m", "merge_cli.conversion.child", str(file), str(target),
               str(limit), json.dumps(list(seen)), copies]  # fmt: skip
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           check=False)  # fmt: skip
    try:
        answer: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        if "memory" in last.lower() or ended.returncode < 0:
            what = f"{file.name} needs more memory than {limit / 1e9:.1f} GB"
            raise ResourceError(what, hint="Give it more with --max-memory.") from None
        raise SourceError(f"cannot be converted: {last}", model=model, file=file.name) from None
    if "error" not in answer:
        return answer
    what, hint = f"cannot be opened: {answer['error']}", ""
    if answer["unsafe"]:
        what = "holds more than tensors, and opening it would run its code"
        hint = "Do not open it, unless you trust who made it: then load and save it with torch."
    raise SourceError(what, model=model, file=file.name, hint=hint)


def _finish(
    found: Sequence[Mapping[str, Any]], partial: Path
) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    """The index, and the sums; the working files go."""
    weight_map = {name: one["file"] for one in found for name in one["tensors"]}
    size = 0
    for one in found:
        file = partial / one["file"]
        refs = parse_header(read_header_file(file, ""), file, file.stat().st_size, "")
        size += sum(ref.nbytes for ref in refs.values())
        (partial / f"{one['file']}.json").unlink()
    if len(found) > 1:
        ordered = dict(sorted(weight_map.items()))
        document = {"metadata": {"total_size": size}, "weight_map": ordered}
        (partial / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tied = tuple(sorted({name for one in found for name in one["tied"]}))
    left_out = tuple(sorted({name for one in found for name in one["left_out"]}))
    return len(weight_map), size, tied, left_out


def _close(lock: int) -> None:
    os.close(lock)
