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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.plan import Plan
from merge_cli.engine.statistics import TensorStats

_FORMAT = 1


def work_key(plan: Plan, *context: object) -> str:
    """A digest of everything that the output's bytes and the units depend on.

    Args:
        context: what else makes it other work: the kind of device, whether statistics are taken.
    """
    import torch

    code = inspect.getsource(sys.modules[plan.method.function.__module__])
    state = hashlib.sha256(f"merge-cli journal {_FORMAT} {version('merge-cli')}\n".encode())
    state.update(repr((torch.__version__, plan.method.name, plan.recipe.seed, context)).encode())
    state.update(code.encode())
    stamps: dict[Path, str] = {}
    for task in plan.tasks:
        for ref in task.inputs:
            if ref.path not in stamps:
                # The same header over other weights must not pass for the same input.
                status = ref.path.stat()
                stamps[ref.path] = f"{status.st_size} {status.st_mtime_ns}"
        inputs = [(str(r.path), r.name, r.dtype, r.shape, r.offset) for r in task.inputs]
        state.update(repr((task.output, task.action, task.ids, inputs)).encode())
        state.update(repr(sorted(task.parameters.items())).encode())
    state.update(repr(sorted((str(path), stamp) for path, stamp in stamps.items())).encode())
    for shard in plan.shards:
        state.update(shard.file.encode() + shard.header)
    return state.hexdigest()


class Journal:
    """An append-only file; safe to write from several threads.

    Attributes:
        done: unit number -> its statistics, from earlier runs.
        count: units that are recorded, old and new.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Continue the journal of this key, or begin one.

        Raises:
            ResourceError: it cannot be written.
        """
        self._path = path
        self._mutex = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self.done, good = _read(path, key)
            os.ftruncate(self._fd, good)  # drops a torn last line, or all of another work's
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise write_error(error, path) from error
        self.count = len(self.done)
        if not good:
            self._write({"key": key, "boot": _boot_id()})

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
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            with self._mutex:
                while data:
                    data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise write_error(error, self._path) from error


def _read(path: Path, key: str) -> tuple[dict[int, TensorStats], int]:
    """The units that may be believed, and how many bytes of the journal say so."""
    units: list[tuple[int, TensorStats, int]] = []
    good = synced = start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            entry = _parse(line)
            if entry is None or (number == 0 and entry.get("key") != key):
                break
            good += len(line)
            if number == 0:
                start = good
                same_boot = entry.get("boot") == _boot_id()
            elif "unit" in entry:
                units.append((entry["unit"], TensorStats.from_json(entry["stats"]), good))
            elif "synced" in entry:
                synced = entry["synced"]
    if good and not same_boot:
        units = units[:synced]
        good = units[-1][2] if units else start
    return {number: stats for number, stats, _ in units}, good


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
