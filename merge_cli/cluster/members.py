"""Nodes that take part in a merge, as the driver sees them: process, journal, share."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.cluster.connection import Node, on_node, reason
from merge_cli.cluster.node import NodeWorker, ShareStats
from merge_cli.engine.journal import chunks_of
from merge_cli.engine.merge_stats import NodeStats, TensorStats
from merge_cli.errors import MergeCliError
from merge_cli.planning.chunks import Chunk
from merge_cli.system.raw_io import write_error
from merge_cli.system.records import read_lines

_SOON_SECONDS = 10.0  # then the user is told what is waited for
_START_SECONDS = 120.0  # for a node's process to start, and for its CPUs to be free


class NodeLog:
    """The lines that a node's journal has grown by, of chunks whose bytes are on the storage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = self._given = 0
        self._lines: list[list[tuple[int, TensorStats]]] = []

    def read(self) -> list[tuple[int, TensorStats]]:
        """What is new: chunks and their statistics.

        Raises:
            ResourceError: it is there and cannot be read.
        """
        try:
            return self._read()
        except OSError as error:
            raise write_error(error, self.path) from error

    def _read(self) -> list[tuple[int, TensorStats]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:  # opened anew: a network's file system looks again
            file.seek(self._offset)
            entries, length = read_lines(file.read())
        self._offset += length
        until = self._given
        for entry in entries:
            if "chunks" in entry:
                self._lines.append(chunks_of(entry))
            until = entry.get("synced", until)
        new = self._lines[self._given : until]
        self._given = until
        return [chunk for line in new for chunk in line]


@dataclass
class Member:
    """A node that takes part.

    Attributes:
        threads: on a CPU; None where GPUs compute.
        actor: its process, Ray's handle.
        log: what its journal says.
        share: what it is merging.
        call: for which it answers; None while it has nothing to do.
        answers: for its shares.
        bytes: of output that it has merged.
        lost: it takes no part any more.
    """

    node: Node
    threads: int | None
    actor: Any
    log: NodeLog
    share: list[Chunk] = field(default_factory=list)
    call: Any = None
    answers: list[ShareStats] = field(default_factory=list)
    bytes: int = 0
    lost: bool = False

    @property
    def stats(self) -> NodeStats:
        """What it did, for the report."""
        return NodeStats(
            self.node.name,
            self.answers[-1].threads if self.answers else 0,
            self.bytes,
            max((answer.peak_rss for answer in self.answers), default=0),
            sum(answer.seconds for answer in self.answers),
            self.lost,
        )


def start_member(
    ray: Any, node: Node, work: Any, folder: Path, kind: str, threads: int | None
) -> Member:
    """Start the engine's process on a node, with all that the merge may have of it.

    Args:
        work: a `Work` in Ray's object store.
        folder: for the node's journal.
        kind: of the device, cpu or cuda.
        threads: at most; None for every CPU that the node offers.
    """
    path = folder / f"{node.id[:12]}-{secrets.token_hex(4)}.jsonl"
    cpus = min(threads or node.cpus, node.cpus)
    remote = ray.remote(
        num_cpus=cpus,
        num_gpus=0 if kind == "cpu" else node.gpus,
        max_concurrency=2,  # one for shares, one for `stop`
        max_restarts=0,
        scheduling_strategy=on_node(ray, node),
    )(NodeWorker)
    node_threads = cpus if kind == "cpu" else None
    return Member(
        node, node_threads, remote.remote(work, node_threads, path.absolute()), NodeLog(path)
    )


def open_members(ray: Any, members: Sequence[Member], note: Callable[[str], None]) -> None:
    """Wait until their processes have started and opened the merge. Who cannot is lost.

    Args:
        note: is told what is waited for, and who takes no part.

    Raises:
        MergeCliError: of a node's own, as it says.
    """
    opened = [member.actor.open.remote() for member in members]
    ready, waiting = ray.wait(opened, num_returns=len(opened), timeout=_SOON_SECONDS)
    if waiting:
        those = f"{len(waiting)} of {len(opened)} nodes" if len(opened) > 1 else "the node"
        note(f"waiting for {those} to start a process, and for free CPUs")
        ready, _ = ray.wait(opened, num_returns=len(opened), timeout=_START_SECONDS)
    for member, call in zip(members, opened, strict=True):
        why = f"its CPUs are not free after {_START_SECONDS:.0f} seconds"
        if call in ready:
            try:
                checked(ray.get(call))
                continue
            except ray.exceptions.RayError as error:
                why = reason(error)
        member.lost = True
        ray.kill(member.actor)
        note(f"node {member.node.name} takes no part: {why}")


def checked(answer: Any) -> Any:
    """A node's answer.

    Raises:
        MergeCliError: the one that it answers with.
    """
    if isinstance(answer, MergeCliError):
        raise answer
    return answer
