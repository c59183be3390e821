"""Where training stands, in one file: coefficients, moments, position, history, the best so far.

    OUT.training/checkpoint.safetensors    replaced whole every few minutes
    OUT.training/coefficients.safetensors  the result, when training has ended
    OUT.training/training.json             its record, for the report

There is no state of a random generator to keep: what comes next is a function of seed and step. So
a run that is killed and continued ends with the same bits as one that is not (on a CPU; a GPU's own
sums may differ from run to run).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.coefficients import FILE, open_coefficients
from merge_cli.checkpoint.fingerprint import file_fingerprint
from merge_cli.dam.student import Student
from merge_cli.errors import MergeCliError, NonFiniteError
from merge_cli.system.raw_io import replace_file
from merge_cli.system.records import read_sealed
from merge_cli.system.workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Self

_CHECKPOINT, _RECORD = "checkpoint.safetensors", "training.json"


@dataclass
class Position:
    """Where training stands.

    Attributes:
        step: optimizer steps done; `ended` says why there will be no more.
        history: one dict for each step, and for each held-out measurement.
        static: held-out scores of merges without training; `start` is the one that is begun from.
        tested: scores on test rows, of the best of those and of what was learned.
        broken: those that predict NaN or Inf.
        best_step, best_kl: of the best measurement; its coefficients are kept, too.
        seconds, tokens, passes: of training so far, over all runs and processes.
        teaching: seconds in which teachers were asked, over all runs.
        held_out_passes, bytes_reduced: this process's own, over all runs.
    """

    step: int = 0
    ended: str = ""
    history: list[dict[str, Any]] | None = None
    measured: list[dict[str, Any]] | None = None
    static: dict[str, dict[str, Any]] | None = None
    tested: dict[str, dict[str, Any]] | None = None
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
        self.tested = self.tested or {}


class TrainingWorkspace(Workspace):
    """OUT.training: a context manager that holds its lock.

    Args:
        target: OUT.
        key: of the work (see `run.work_key`); another one's folder is not continued.
        fresh: throw away what is there.
        first: of several processes that train together the others hold no lock.
    """

    def __init__(self, target: Path, key: str, *, fresh: bool = False, first: bool = True) -> None:
        super().__init__(target, ".training", "training")
        self.key, self._fresh, self._first = key, fresh, first

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ResourceError: another process trains here, or the place cannot be written.
            UsageError: unfinished training of something else is here, or somebody else's folder.
        """
        if not self._first:
            return self
        super().__enter__()
        try:
            self.resume_work(self.key, fresh=self._fresh)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def coefficients(self) -> Path:
        """The file of the result."""
        return self.path / FILE

    def whole(self, method: str) -> Path:
        """The folder of a whole merge that learning can start from."""
        return self.path / method

    def position(self) -> Position | None:
        """Where the checkpoint stands; None where there is none of this work."""
        content = self._checkpoint()
        about = _metadata_of(content) if content else {}
        if content is None or about.get("key") != self.key:
            return None
        return Position(**json.loads(about["position"]))

    def record(self) -> dict[str, Any] | None:
        """The record of training that has ended; None while it has not, or is not whole."""
        record = self.read_record(_RECORD, self.key)
        if record is None:
            return None
        fingerprint = record.pop("coefficients_file", None)
        return record if fingerprint == _fingerprint_of(self.coefficients) else None

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
        about = {"coefficients_file": _fingerprint_of(self.coefficients)}
        self.write_record(_RECORD, self.key, {**about, **record})

    def save(self, student: Student, position: Position, best: Mapping[str, Any]) -> None:
        """Write a checkpoint between two steps, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"best:{name}": value for name, value in best.items()}
        for name, kind, i, value in _state(student):
            tensors[f"{kind}{i}:{name}"] = value.detach().cpu().contiguous()
        about = {"key": self.key, "position": json.dumps(vars(position))}
        replace_file(self.path / _CHECKPOINT, _with_metadata(save(tensors), about, summed=True))

    def resume(self, student: Student) -> tuple[Position, dict[str, Any]] | None:
        """Put a student where the checkpoint is; its position and its best coefficients.

        None where there is no checkpoint, or one that is not what was written.
        """
        position, content = self.position(), self._checkpoint()
        if position is None or content is None:
            return None
        from safetensors.torch import load

        result = load(content)
        best = {
            key.partition(":")[2]: value for key, value in result.items() if key.startswith("best:")
        }
        for name, kind, i, value in _state(student):
            value.copy_(result[f"{kind}{i}:{name}"])
        for coefficients in student.coefficients.values():
            coefficients.moved()
        student.steps = position.step - position.overflows
        student.grad_scale = position.grad_scale
        student.write_all()
        return position, best

    def _checkpoint(self) -> bytes | None:
        """The checkpoint, if it is there and holds."""
        try:
            content = (self.path / _CHECKPOINT).read_bytes()
        except FileNotFoundError:
            return None
        return content if _holds(content) else None

    def key_here(self) -> str | None:
        record = read_sealed(self.path / _RECORD)
        if record is not None:
            return str(record.get("key"))
        content = self._checkpoint()
        return _metadata_of(content).get("key") if content else None


def left_over(target: Path) -> TrainingWorkspace | None:
    """OUT.training with a result that OUT holds already: its process was killed while tidying up.

    None where there is no such folder, or where OUT was made of other coefficients.
    """
    path = TrainingWorkspace(target, "").path
    try:
        report = json.loads((target / "merge_report.json").read_text(encoding="utf-8"))
        key = (read_sealed(path / _RECORD) or {})["key"]
        published = report["coefficients"]["digest"]
        digest = open_coefficients(path / FILE).digest
    except (OSError, ValueError, KeyError, TypeError, MergeCliError):
        return None
    return TrainingWorkspace(target, str(key)) if digest == published else None


def write_coefficients(path: Path, entries: Mapping[str, Any], form: str) -> None:
    """A file of coefficients (see `checkpoint.coefficients`)."""
    from safetensors.torch import save

    from merge_cli.checkpoint.coefficients import FORMAT

    replace_file(path, _with_metadata(save(dict(entries)), {"format": FORMAT, "form": form}))


def _with_metadata(content: bytes, metadata: Mapping[str, str], *, summed: bool = False) -> bytes:
    """A safetensors file with metadata in sorted order.

    safetensors itself writes several entries in the order of a hash that differs from run to run:
    equal coefficients would be different bytes, with another digest.

    Args:
        summed: with a digest of all the rest, under `sum`.
    """
    entries, data = _split(content)
    values = dict(sorted(metadata.items()))
    if summed:
        values["sum"] = _sum(entries, values, data)
    about = {"__metadata__": values, **entries}
    header = json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data that follows is aligned
    return b"".join([struct.pack("<Q", len(header)), header, data])


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """The entries of a header (with its metadata, if any), and the data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def _sum(entries: Mapping[str, Any], metadata: Mapping[str, str], data: memoryview) -> str:
    state = hashlib.sha256(json.dumps([entries, metadata], sort_keys=True).encode())
    state.update(data)
    return state.hexdigest()


def _holds(content: bytes) -> bool:
    """Whether a file is what `_with_metadata` has summed."""
    try:
        entries, data = _split(content)
        metadata = dict(entries.pop("__metadata__"))
        return bool(metadata.pop("sum") == _sum(entries, metadata, data))
    except (ValueError, TypeError, AttributeError, KeyError, struct.error, RecursionError):
        return False  # torn, or of a version that summed nothing


def _metadata_of(content: bytes) -> dict[str, str]:
    """Of a file that holds."""
    return dict(_split(content)[0]["__metadata__"])


def _fingerprint_of(path: Path) -> str:
    """`file_fingerprint`; empty where the file cannot be read."""
    try:
        return file_fingerprint(path)
    except OSError:
        return ""


def _state(student: Student) -> Sequence[tuple[str, str, int, Any]]:
    """Everything that steps change: (tensor, kind, number, value)."""
    result = []
    for name in student.trained:
        coefficients = student.coefficients[name]
        moments = student.moments(name)
        for i, parameter in enumerate(coefficients.parameters):
            result += [
                (name, "p", i, parameter),
                (name, "m", i, moments[i][0]),
                (name, "v", i, moments[i][1]),
            ]
    return result
