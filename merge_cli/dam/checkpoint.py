"""Where training stands, in one file: coefficients, moments, position, history, the best so far.

    OUT.training/checkpoint.safetensors    replaced whole every few minutes
    OUT.training/coefficients.safetensors  the result, when training has ended
    OUT.training/training.json             its record, for the report

There is no state of a random generator to keep: what comes next is a function of seed and step. So
a run that is killed and continued ends with the same bits as one that is not (on a CPU; a GPU's own
sums may differ from run to run).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from merge_cli.checkpoint.coefficients import FILE, open_coefficients
from merge_cli.dam.student import Student
from merge_cli.engine.beside import folder_beside, lock_folder, other_work, replace_file
from merge_cli.errors import MergeCliError, NonFiniteError

_CHECKPOINT, _RECORD = "checkpoint.safetensors", "training.json"


@dataclass
class Position:
    """Where training stands.

    Attributes:
        step: optimizer steps done; `ended` says why there will be no more.
        history: one dict for each step, and for each held-out measurement.
        static: held-out scores of merges without training; `start` is the one that is begun from.
        broken: those that predict NaN or Inf.
        best: step and mean held-out KL of the best measurement; its coefficients are kept, too.
        seconds, tokens, passes: of training so far, over all runs and processes.
        teaching: seconds in which teachers were asked, over all runs.
        held_out_passes, bytes_reduced: this process's own, over all runs.
    """

    step: int = 0
    ended: str = ""
    history: list[dict[str, Any]] | None = None
    measured: list[dict[str, Any]] | None = None
    static: dict[str, dict[str, Any]] | None = None
    broken: list[str] | None = None
    start: str = ""
    best_step: int = -1
    best_kl: float = float("inf")
    stale: int = 0
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    teaching: float = 0.0
    held_out_passes: int = 0
    bytes_reduced: int = 0
    overflows: int = 0
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        self.history = self.history or []
        self.measured = self.measured or []
        self.static = self.static or {}


class TrainingFolder:
    """OUT.training: a context manager that holds its lock.

    Args:
        target: OUT.
        key: of the work (see `run.work_key`); another one's folder is not continued.
        fresh: throw away what is there.
    """

    def __init__(self, target: Path, key: str, *, fresh: bool = False, first: bool = True) -> None:
        self.path = folder_beside(target, ".training")
        self.key, self._fresh, self._first = key, fresh, first
        self._lock = -1

    def __enter__(self) -> TrainingFolder:
        """Take the lock.

        Raises:
            ResourceError: another process trains here, or the place cannot be written.
            UsageError: unfinished training of something else is here.
        """
        if not self._first:
            return self
        self._lock = lock_folder(self.path, "training")
        if self._fresh:
            for name in (_CHECKPOINT, _RECORD, FILE):
                (self.path / name).unlink(missing_ok=True)
        found = self._key_of()
        if found not in (None, self.key):
            self.__exit__(None, None, None)
            raise other_work("training", self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def coefficients(self) -> Path:
        """The file of the result."""
        return self.path / FILE

    def record(self) -> dict[str, Any] | None:
        """The record of training that has ended; None while it has not."""
        path = self.path / _RECORD
        if not (path.exists() and self.coefficients.exists()):
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found) if found.get("key") == self.key else None

    def finish(self, entries: Mapping[str, Any], form: str, record: Mapping[str, Any]) -> None:
        """Write the result. The record comes last: where there is one, all is there.

        Raises:
            NonFiniteError: a coefficient is NaN or infinite: the last step has gone too far.
        """
        for name, value in entries.items():
            if not value.isfinite().all():
                hint = "Use a smaller learning_rate, with --fresh."
                raise NonFiniteError("a learned coefficient is not finite", tensor=name, hint=hint)
        write_coefficients(self.coefficients, entries, form)
        text = json.dumps({"key": self.key, **record}, ensure_ascii=False)
        replace_file(self.path / _RECORD, text.encode())

    def discard(self) -> None:
        """Throw the folder away: the model that came of it is published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def save(self, student: Student, position: Position, best: Mapping[str, Any]) -> None:
        """Write a checkpoint between two steps, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"best:{name}": value for name, value in best.items()}
        for name, kind, i, value in _state(student):
            tensors[f"{kind}{i}:{name}"] = value.detach().cpu().contiguous()
        about = {"key": self.key, "position": json.dumps(vars(position))}
        replace_file(self.path / _CHECKPOINT, save(tensors, about))

    def resume(self, student: Student) -> tuple[Position, dict[str, Any]] | None:
        """Put a student where the checkpoint is; its position and its best coefficients."""
        path = self.path / _CHECKPOINT
        if not path.exists():
            return None
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            names = list(file.keys())  # an open file is no mapping: it has keys() alone
            position = Position(**json.loads(file.metadata()["position"]))
            best = {
                key.partition(":")[2]: file.get_tensor(key)
                for key in names if key.startswith("best:")
            }  # fmt: skip
            for name, kind, i, value in _state(student):
                value.copy_(file.get_tensor(f"{kind}{i}:{name}"))
        for coefficients in student.coefficients.values():
            coefficients.moved()
        student.steps = position.step - position.overflows
        student.grad_scale = position.grad_scale
        student.write_all()
        return position, best

    def _key_of(self) -> str | None:
        """The key of whatever is here; None where nothing is."""
        record, path = self.path / _RECORD, self.path / _CHECKPOINT
        if record.exists():
            return str(json.loads(record.read_text(encoding="utf-8")).get("key"))
        if not path.exists():
            return None
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("key"))


def left_over(target: Path) -> TrainingFolder | None:
    """OUT.training with a result that OUT holds already: its process was killed while tidying up.

    None where there is no such folder, or where OUT was made of other coefficients.
    """
    path = TrainingFolder(target, "").path
    try:
        report = json.loads((target / "merge_report.json").read_text(encoding="utf-8"))
        key = json.loads((path / _RECORD).read_text(encoding="utf-8"))["key"]
        published = report["coefficients"]["digest"]
        digest = open_coefficients(path / FILE).digest
    except (OSError, ValueError, KeyError, TypeError, MergeCliError):
        return None
    return TrainingFolder(target, str(key)) if digest == published else None


def write_coefficients(path: Path, entries: Mapping[str, Any], form: str) -> None:
    """A file of coefficients (see `checkpoint.coefficients`)."""
    from safetensors.torch import save

    from merge_cli.checkpoint.coefficients import FORMAT

    replace_file(path, _with_metadata(save(dict(entries)), {"format": FORMAT, "form": form}))


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in sorted order.

    safetensors itself writes several entries in the order of a hash that differs from run to run:
    equal coefficients would be different bytes, with another digest.
    """
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    about = {"__metadata__": dict(sorted(metadata.items())), **entries}
    header = json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data that follows is aligned
    return b"".join([struct.pack("<Q", len(header)), header, memoryview(content)[8 + length :]])


def _state(student: Student) -> Sequence[tuple[str, str, int, Any]]:
    """Everything that steps change: (tensor, kind, number, value)."""
    found = []
    for name in student.trained:
        own = student.coefficients[name]
        moments = student.moments(name)
        for i, parameter in enumerate(own.parameters):
            found += [(name, "p", i, parameter), (name, "m", i, moments[i][0]),
                      (name, "v", i, moments[i][1])]  # fmt: skip
    return found
