"""How a merge is run, and how it reports progress. Nothing here changes the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from merge_cli.errors import UsageError

DEFAULT_MEMORY = 1_250_000_000


@dataclass(frozen=True)
class MergeOptions:
    """What a user may choose.

    Attributes:
        device: auto, cpu, cuda or cuda:N; in a plan also cuda:80GB, a card that is not here.
        threads: computing threads on a CPU; None means one for each core that may be used.
        max_memory: bytes that the whole process should stay under.
        overwrite: replace an existing output.
        fresh: do not resume.
        statistics: measure norms, cosines and signs on the way, for the report.
        fsync: publish only when the bytes are on the disk itself, safe against power failure.
        allow_non_finite: merge NaN and Inf as they are.
        trust_remote_code: copy the config source's Python files; nothing is run.
        copy_tokenizer: copy tokenizer files.
        model_card: write README.md.
        accept_best: `merge_method: auto` publishes the best merge so far where it is stopped, or
            where it has been stopped before.
        ray: the address of the Ray cluster whose nodes share the merge (`auto`: RAY_ADDRESS, or the
            one of this machine); None merges here.
        keep_stages: leave the results of a recipe's other documents in OUT.stages.
    """

    device: str = "auto"
    threads: int | None = None
    max_memory: int = DEFAULT_MEMORY
    overwrite: bool = False
    fresh: bool = False
    statistics: bool = True
    fsync: bool = False
    allow_non_finite: bool = False
    trust_remote_code: bool = False
    copy_tokenizer: bool = True
    model_card: bool = True
    accept_best: bool = False
    keep_stages: bool = False
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}")

    def on_engine(self, engine: str) -> MergeOptions:
        """The same, with what a recipe says of it: an address that is given is preferred."""
        return replace(self, ray="auto") if engine == "ray" and self.ray is None else self


@dataclass(frozen=True)
class Progress:
    """How far something is: `done` of `total`.

    Attributes:
        stage: what is being done: merge, fetch, train, or the name of an evaluation's task.
        total: 0 where it is not known; then there may be a note alone.
        unit: what is counted; empty where it depends on the task.
        model: whose turn it is, where several models are looked at.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    unit: str = "bytes"
    model: str = ""


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: object) -> None:
    """Progress that nobody asked for."""
