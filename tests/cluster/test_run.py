"""Merges on a real Ray cluster of several nodes: the same bytes, whoever is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli import api
from merge_cli.cluster import run as cluster_run
from merge_cli.cluster.connection import check_storage, nodes_of
from merge_cli.cluster.run import RayCluster
from merge_cli.errors import Interrupted, NonFiniteError, ResourceError, UsageError
from merge_cli.options import MergeOptions, Progress
from tests.support.command import cli, failed
from tests.support.merges import digest, write_recipe
from tests.support.paths import ROOT
from tests.support.tiny import Family, llama_family, write_model

ray = pytest.importorskip("ray")
# Ray's own warnings; and one worker of pytest starts the only cluster.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.xdist_group("ray")]
SMALL = {"object_store_memory": 80_000_000, "num_cpus": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a node, with one CPU each; what they import, they find where this process does."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        head = {**SMALL, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add_node(**SMALL)
        ray.init(address=made.address, log_to_driver=False, configure_logging=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of a few tensors, so that a small model is many of them."""
    monkeypatch.setattr(cluster_run, "LEAST_BYTES", 1)


def merge(recipe: Any, out: Path, cluster: Any = None, **options: Any) -> dict[str, Any]:
    """Merge, on the cluster if one is given; returns the report."""
    address = None if cluster is None else cluster.address
    chosen = MergeOptions(ray=address, **options)
    return merge_cli.merge(recipe, out, options=chosen).report


@pytest.mark.usefixtures("small_shares")
def test_two_nodes_write_the_bytes_of_one_machine(
    cluster: Any, family: Family, tmp_path: Path
) -> None:
    for case in ("ties", "ties model", "dare_ties"):
        recipe = write_recipe(family, case)
        alone = merge(recipe, tmp_path / f"{case} alone")
        report = merge(recipe, tmp_path / case, cluster)
        assert digest(tmp_path / case) == digest(tmp_path / f"{case} alone")
        nodes = report["cost"]["nodes"]
        assert len(nodes) == 2 and all(node["bytes"] > 0 for node in nodes)
        sizes = [tensor.numel() * 2 for tensor in _tensors(tmp_path / case)]
        assert sum(node["bytes"] for node in nodes) == sum(sizes)
        assert report["statistics"] == alone["statistics"]
        assert report["work"] == alone["work"]
        assert not (tmp_path / f"{case}.partial").exists()
    assert not list(tmp_path.glob(".merge-cli-probe*"))


def _tensors(folder: Path) -> list[torch.Tensor]:
    from tests.support.tiny import read_model

    return [*read_model(folder).values()]
