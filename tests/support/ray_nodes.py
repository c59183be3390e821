"""A real Ray cluster of a few small nodes on this machine, one of which may be killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL = {"object_store_memory": 80_000_000, "num_cpus": 1}


@dataclass
class Nodes:
    """A cluster, and the nodes that were added to its head."""

    cluster: Any
    added: list[Any] = field(default_factory=list)

    def add(self) -> None:
        self.added.append(self.cluster.add_node(**SMALL))

    def kill(self) -> None:
        """The node that was added last, with all of its processes, without a word."""
        self.cluster.remove_node(self.added.pop(), allow_graceful=False)
