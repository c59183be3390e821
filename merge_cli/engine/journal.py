"""What has been done, on disk, so that a killed merge continues where it stopped.

One JSON line for each finished unit, written after its bytes. The first line is the key of the
work: recipe, inputs, layout and code. Lines survive the death of the process; after a crash of the
machine itself (another boot), bytes that the journal calls written may not be on the disk, so only
what a `synced` line covers is believed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.plan import Plan
from merge_cli.engine.statistics import TensorStats
from merge_cli.recipe.reference import local_file

_FORMAT = 1


def work_key(plan: Plan, *context: object) -> str:
    """A digest of everything that the output's bytes and the units depend on.

    Args:
        context: what else makes it other work: the kind of device, whether statistics are taken.
    """
    function = plan.method.function
    try:
        code = inspect.getsource(sys.modules[function.__module__])
    except (OSError, TypeError):  # defined at a prompt: there is no file to read
        code = repr((function.__code__.co_code, function.__code__.co_consts))
    state = hashlib.sha256(f"merge-cli journal {_FORMAT} {version('merge-cli')}\n".encode())
    state.update(repr((version("torch"), plan.method.name, plan.recipe.seed, context)).encode())
    state.update(code.encode())
    if plan.coefficients is not None:
        state.update(plan.coefficients.digest.encode())
    if plan.gathered is not None:
        state.update(repr(plan.gathered.digests).encode())
    elif plan.gathers:  # a stage: what will be gathered follows from this
        state.update(_examples(plan))
    made = {
        source.root: (source.label, work_key(plan.stages[source.label], *context))
        for source in plan.sources
        if source.label in plan.stages
    }
    pinned = {
        one.root
        for source in plan.sources
        for one in (source, source.adapter)
        if one is not None and one.hub is not None
    }
    paths: dict[Path, str] = {}
    stamps: list[tuple[str, str]] = []
    settings: dict[int, str] = {}  # by identity: tensors that are treated alike share theirs
    for task in plan.tasks:
        stored = [ref for tensor in task.inputs for ref in tensor.stored]
        for ref in stored:
            if ref.path not in paths:
                # What another document makes is known by how it is made: it need not be there yet.
                stage, stamp = made.get(ref.path.parent) or ("", "")
                paths[ref.path] = f"{stage}/{ref.path.name}" if stage else str(ref.path)
                if not pinned.isdisjoint(ref.path.parents):
                    stamp = "a commit"  # stands in the path; the file may still have to be fetched
                stamps.append((paths[ref.path], stamp or _stamp(ref.path)))
        inputs: list[Any] = [(paths[r.path], r.name, r.dtype, r.shape, r.offset) for r in stored]
        inputs += [formula for tensor in task.inputs if (formula := tensor.formula)]
        setting = settings.get(id(task.parameters))
        if setting is None:
            setting = settings[id(task.parameters)] = repr(sorted(task.parameters.items()))
        text = f"({task.outputs!r}, {task.action!r}, {task.ids!r}, {inputs!r}){setting}"
        state.update(text.encode())
    state.update(repr(sorted(stamps)).encode())
    for shard in plan.shards:
        state.update(shard.file.encode() + shard.header)
    state.update(_beside_the_weights(plan, made))
    return state.hexdigest()


def _examples(plan: Plan) -> bytes:
    """What statistics are gathered from, besides the models."""
    recipe, digests = plan.recipe, []
    for spec in recipe.source_specs:
        for name in spec.data.files if spec.data else ():
            path = local_file(name, recipe.folder)
            content = path.read_bytes() if path is not None else b""
            digests.append(hashlib.sha256(content).hexdigest())
    return repr((recipe.statistics, [spec.data for spec in recipe.source_specs], digests)).encode()


def _beside_the_weights(plan: Plan, made: Mapping[Path, object]) -> bytes:
    """What config, tokenizer and template of the output are made of: they are part of the work."""
    files = sorted(
        (name, hashlib.sha256(text).digest()) for name, text in plan.aligned.files.items()
    )
    roots = [plan.sources[i].root for i in (plan.donor, plan.tokenizer_donor)]
    donors = [made.get(root, str(root)) for root in roots]
    about = [donors, files, plan.template, json.dumps(dict(plan.config), sort_keys=True)]
    return repr(about).encode()


def _stamp(path: Path) -> str:
    """The same header over other weights must not pass for the same input."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


class Journal:
    """An append-only file; safe to write from several threads.

    Attributes:
        key: of the work.
        done: unit number -> its statistics, from earlier runs.
        count: units that are recorded, old and new.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Continue the journal of this key, or begin one.

        Raises:
            ResourceError: it cannot be written.
        """
        self._path, self.key = path, key
        self._mutex = threading.Lock()
        try:
            units, same_boot = _read(path, key) if path.exists() else ([], False)
            if not same_boot:
                _rewrite(path, key, units)  # a new journal, or what another boot may believe
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            os.ftruncate(self._fd, _good_length(path))  # drops a torn last line
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise write_error(error, path) from error
        self.done = {number: TensorStats.from_json(stats) for number, stats in units}
        self.count = len(self.done)

    @staticmethod
    def key_of(path: Path) -> str | None:
        """The key of the work that a journal is of."""
        with path.open("rb") as file:
            entry = _parse(file.readline())
        return entry.get("key") if entry else None

    def record(self, number: int, stats: TensorStats) -> None:
        """Note that a unit's bytes are written."""
        self._write({"unit": number, "stats": stats.to_json()})
        with self._mutex:
            self.count += 1

    def synced(self, count: int) -> None:
        """Note that the first `count` recorded units have reached the disk itself."""
        self._write({"synced": count})
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; nothing is buffered, so that nothing can fail here."""
        os.close(self._fd)

    def _write(self, line: dict[str, Any]) -> None:
        data = _line(line)
        try:
            with self._mutex:
                while data:
                    data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise write_error(error, self._path) from error


Units = list[tuple[int, dict[str, Any]]]


def _read(path: Path, key: str) -> tuple[Units, bool]:
    """The units that may be believed, and whether the machine has not been restarted since."""
    units: Units = []
    same_boot, synced = False, 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            entry = _parse(line)
            if entry is None or (number == 0 and entry.get("key") != key):
                break
            if number == 0:
                same_boot = entry.get("boot") == _boot_id()
            elif "unit" in entry:
                units.append((entry["unit"], entry["stats"]))
            elif "synced" in entry:
                synced = entry["synced"]
    return (units if same_boot else units[:synced]), same_boot


def _rewrite(path: Path, key: str, units: Units) -> None:
    """Begin a journal of this boot with units that are known to be on the disk."""
    lines: list[dict[str, Any]] = [{"key": key, "boot": _boot_id()}]
    lines += [{"unit": number, "stats": stats} for number, stats in units]
    if units:
        lines.append({"synced": len(units)})
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.writelines(_line(line) for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _good_length(path: Path) -> int:
    """The bytes of whole lines."""
    good = 0
    with path.open("rb") as file:
        for line in file:
            if _parse(line) is None:
                break
            good += len(line)
    return good


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """One line, or None where it is torn."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _boot_id() -> str:
    """Identifies this boot of the machine; empty where the system does not tell (macOS)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
