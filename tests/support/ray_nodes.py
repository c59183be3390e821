"""A real Ray cluster of a few small nodes on this machine, one of which may be killed.

A process can be connected to one cluster only, so all tests of a process share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.paths import ROOT

SMALL = {"object_store_memory": 80_000_000, "num_cpus": 1}


@contextmanager
def _surroundings() -> Iterator[None]:
    """What a node inherits. Other tests of this process do not see it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine starves them
        yield


@dataclass
class Nodes:
    """A cluster, and the nodes that were added to its head."""

    cluster: Any
    added: list[Any] = field(default_factory=list)

    def add(self) -> None:
        with _surroundings():
            self.added.append(self.cluster.add_node(**SMALL))

    def kill(self) -> None:
        """The node that was added last, with all of its processes, without a word."""
        self.cluster.remove_node(self.added.pop(), allow_graceful=False)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """A head and a node, with one CPU each; what they import, they find where this process does."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with _surroundings():
        head = {**SMALL, "include_dashboard": False}
        made = Nodes(Cluster(initialize_head=True, head_node_args=head))
    made.add()
    ray.init(address=made.cluster.address, log_to_driver=False, configure_logging=False)
    yield made
    ray.shutdown()
    made.cluster.shutdown()
