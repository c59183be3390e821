"""A search whose merge is on a cluster: its candidates are evaluated there, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import merge_cli
from merge_cli.evolve.jobs import Setup
from merge_cli.evolve.workers import RayWorkers
from tests.support.evolve_tiny import OPTIONS, write_family, write_search
from tests.support.merges import digest
from tests.support.ray_nodes import Nodes

pytest.importorskip("ray")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.xdist_group("ray")]


@pytest.mark.slow
def test_candidates_are_evaluated_on_the_nodes(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation at once, and the result of one worker."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    recipe = write_search(write_family(tmp_path), {"evaluations": 8})
    alone = merge_cli.merge(recipe, tmp_path / "alone", options=OPTIONS)
    counts: list[int] = []
    real = RayWorkers.__init__

    def counted(self: RayWorkers, setup: Setup, count: int | None) -> None:
        real(self, setup, count)
        counts.append(self.pool.count)

    monkeypatch.setattr(RayWorkers, "__init__", counted)
    options = replace(OPTIONS, ray=nodes.cluster.address)
    shared = merge_cli.merge(recipe, tmp_path / "shared", options=options)
    assert counts == [1 + len(nodes.added)]
    assert digest(shared.path) == digest(alone.path)
    name = "best_recipe.yaml"
    assert (shared.path / name).read_text() == (alone.path / name).read_text()
    assert shared.report["cost"]["nodes"]
