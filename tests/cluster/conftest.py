"""One cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT
from tests.support.ray_nodes import SMALL, Nodes


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    """A head and a node, with one CPU each; what they import, they find where this process does."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine starves them
        head = {**SMALL, "include_dashboard": False}
        made = Nodes(Cluster(initialize_head=True, head_node_args=head))
        made.add()
        ray.init(address=made.cluster.address, log_to_driver=False, configure_logging=False)
        yield made
        ray.shutdown()
        made.cluster.shutdown()
