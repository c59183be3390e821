"""What runs on a node of a cluster: the same engine on a share of the chunks, with a journal.

A chunk counts when its bytes have reached the storage that all nodes share, and not only this
node's cache: the shards are synced every second, and the journal says up to where. So what a
journal tells of is there even if the node is gone the next moment.
"""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.engine.device import Device, choose_device
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.journal import Journal, work_key
from merge_cli.engine.loop import Share, run_loop
from merge_cli.engine.memory import peak_rss
from merge_cli.engine.merge_stats import StageTime
from merge_cli.errors import Interrupted, MergeCliError, ResourceError, SourceError
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning.chunks import Chunk
from merge_cli.planning.plan import Plan
from merge_cli.system.raw_io import sync, write_error

_SYNC_SECONDS = 1.0
SHARED_CACHE = "Set MERGE_CLI_CACHE to a folder on storage that all nodes share."
SHARED = "Models and OUT must be on storage that every node has under the same path."


@dataclass(frozen=True)
class Probe:
    """A file by which a node shows that it has the driver's storage.

    Attributes:
        path: of the file, which the driver has filled with `content`.
        offset: where this node writes `answer`.
    """

    path: Path
    content: bytes
    offset: int
    answer: bytes


def look(probe: Probe) -> str:
    """Answer a probe; returns what is wrong with this node, empty where nothing is."""
    try:
        with probe.path.open("r+b", buffering=0) as file:
            if file.read(len(probe.content)) != probe.content:
                return f"reads something else in {probe.path}"
            os.pwrite(file.fileno(), probe.answer, probe.offset)
            os.fsync(file.fileno())
    except FileNotFoundError:
        return f"does not see {probe.path.parent}"
    except OSError as error:
        return f"cannot write in {probe.path.parent}: {error.strerror}"
    return ""


def software() -> str:
    """What must be the same on all nodes."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"merge-cli {version('merge-cli')}, Python {python}"


@dataclass(frozen=True)
class Work:
    """A merge, as a node gets it.

    Attributes:
        key: of the work (`work_key`), and `content` of its inputs: a node must come to the same.
        folder: where the driver stands: relative paths start there.
        kind: of the device, cpu or cuda.
    """

    plan: Plan
    model: Path
    key: str
    content: str
    folder: str
    kind: str
    options: MergeOptions


@dataclass(frozen=True)
class ShareStats:
    """What a node did for one share.

    Attributes:
        peak_rss: bytes of its process so far.
        model_pass: what the method has learned of the whole model.
    """

    device: Device
    arithmetic: str
    threads: int
    buffers: int
    stages: dict[str, StageTime]
    seconds: float
    survey_seconds: float
    peak_rss: int
    model_pass: Any


class NodeWorker:
    """The engine of one node: an actor that merges shares, one after the other.

    Its methods return a MergeCliError instead of raising it, so that it arrives as what it is.

    Args:
        threads: on a CPU; None where GPUs compute.
        journal: where to note what is done.
    """

    def __init__(self, work: Work, threads: int | None, journal: Path) -> None:
        self._work, self._journal_path = work, journal
        self._options = replace(work.options, threads=threads, ray=None, device=work.kind)
        self._stopping = threading.Event()

    def open(self) -> str | MergeCliError:
        """See that this node has the same inputs and the same software; returns its host's name."""
        work, host = self._work, socket.gethostname()
        try:
            if os.path.isdir(work.folder):  # absolute paths need none
                os.chdir(work.folder)
            if inputs_of(work.plan).content_fingerprint != work.content:
                raise SourceError("a model is not what the driver has under its path", hint=SHARED)
            if work_key(work.plan, work.kind, work.options.statistics) != work.key:
                message = "has another version of torch, or other times of the models' files"
                raise ResourceError(message, hint=f"Install the same everywhere. {SHARED}")
            self._journal = Journal(self._journal_path, work.key)
            return host
        except MergeCliError as error:
            return error.at(f"node {host}")

    def merge(self, chunks: Sequence[Chunk], model_pass: Any) -> ShareStats | MergeCliError:
        """Merge these chunks; without any, make the method's pass over the whole model."""
        share = Share(frozenset(chunk.number for chunk in chunks), model_pass)
        written = _Written(self._work, chunks, self._journal)

        def tick(progress: Progress) -> None:
            if self._stopping.is_set():
                raise Interrupted("stopped")
            written.sync_now_and_then()

        work = self._work
        try:
            device = choose_device(work.kind)
            try:
                stats = run_loop(
                    work.plan, work.model, self._journal, device, self._options, tick, share
                )
            finally:
                written.sync()
        except MergeCliError as error:
            return error.at(f"node {socket.gethostname()}")
        return ShareStats(
            device,
            stats.arithmetic,
            stats.threads,
            stats.buffers,
            dict(stats.stages),
            stats.seconds,
            stats.survey_seconds,
            peak_rss(),
            None if chunks else stats.model_pass,
        )

    def stop(self) -> None:
        """End the share that is being merged after the chunks that have been begun."""
        self._stopping.set()


class _Written:
    """The shards that a share is written to, and the journal that says what has reached them."""

    def __init__(self, work: Work, chunks: Sequence[Chunk], journal: Journal) -> None:
        tasks = (work.plan.tasks[number] for number in {chunk.task for chunk in chunks})
        names = {output.name for task in tasks for output in task.outputs}
        self._shards = [
            work.model / shard.file for shard in work.plan.shards if names & shard.offsets.keys()
        ]
        self._journal, self._synced = journal, journal.count
        self._last = time.monotonic()

    def sync_now_and_then(self) -> None:
        if time.monotonic() - self._last >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until what is written has reached the storage, and say so in the journal."""
        # Counted before the wait: what is written meanwhile may not be covered by it.
        count = self._journal.count
        if count > self._synced:
            try:
                sync(self._shards)
            except OSError as error:
                raise write_error(error, self._shards[0].parent) from error
            self._journal.synced(count)
            self._synced = count
        self._last = time.monotonic()
