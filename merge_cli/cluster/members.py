"""A node that takes part in a merge, as the driver sees it: its process, its journal, its share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.cluster.connection import Node, on_node
from merge_cli.cluster.node import NodeWorker, ShareStats
from merge_cli.engine.journal import chunks_of
from merge_cli.engine.merge_stats import NodeStats, TensorStats
from merge_cli.planning.plan import Chunk
from merge_cli.system.raw_io import write_error
from merge_cli.system.records import read_lines


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
