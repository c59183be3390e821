"""What has been done, on disk, so that a killed merge continues where it stopped.

One JSON line for each finished unit, written after its bytes. The first line is the key of the
work: recipe, inputs and layout. A journal of other work is never continued. Lines survive the
death of the process; after a crash of the machine itself (another boot), bytes that the journal
calls written may not be on the disk, so only units up to the last `synced` line are believed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.plan import Plan
from merge_cli.engine.statistics import TensorStats
from merge_cli.errors import ResourceError

_FORMAT = 1


def work_key(plan: Plan) -> str:
    """A digest of everything that the output's bytes and the units depend on."""
    state = hashlib.sha256(f"merge-cli journal {_FORMAT}\n".encode())
    state.update(f"{plan.method.name} {plan.recipe.seed}\n".encode())
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
    """The journal of one work folder, held exclusively while open.

    Attributes:
        done: unit number -> its statistics, from earlier runs of the same work.
        stale: a journal was found, but of other work (or of nothing readable).
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open or create `folder/journal.jsonl`.

        Raises:
            ResourceError: another process is working here, or the folder cannot be written.
        """
        self._path = folder / "journal.jsonl"
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
        except OSError as error:
            raise write_error(error, folder) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            hint = "Wait for it, or choose another output."
            raise ResourceError(
                "another merge is writing here", where=str(folder), hint=hint
            ) from None
        self.done, self.stale, good = self._read(key)
        self._file.truncate(good)  # drops a torn last line, or all of another work's journal
        if not good:
            self._write({"key": key, "boot": _boot_id()})

    def record(self, number: int, stats: TensorStats) -> None:
        """Note that a unit's bytes are written."""
        self._write({"unit": number, "stats": stats.to_json()})

    def synced(self) -> None:
        """Note that everything recorded so far has reached the disk itself."""
        self._write({"synced": True})
        os.fsync(self._file.fileno())

    def restart(self, key: str) -> None:
        """Forget everything that was done."""
        self._file.truncate(0)
        self.done.clear()
        self._write({"key": key, "boot": _boot_id()})

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            try:
                self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
                self._file.flush()
            except OSError as error:
                raise write_error(error, self._path) from error

    def _read(self, key: str) -> tuple[dict[int, TensorStats], bool, int]:
        """Units done, whether the journal is of other work, and how many bytes of it are good."""
        self._file.seek(0)
        done: dict[int, TensorStats] = {}
        safe: dict[int, TensorStats] = {}
        good = safe_good = 0
        same_boot = False
        for number, line in enumerate(self._file):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            if number == 0:
                if entry.get("key") != key:
                    return {}, True, 0
                same_boot = entry.get("boot") == _boot_id()
            elif "unit" in entry:
                done[entry["unit"]] = TensorStats.from_json(entry["stats"])
            good += len(line)
            if number == 0 or entry.get("synced"):
                safe, safe_good = dict(done), good
        if not same_boot:
            done, good = safe, safe_good
        return done, False, good


def _boot_id() -> str:
    """Identifies this boot of the machine; empty where the system does not tell (macOS)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
