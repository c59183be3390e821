"""Who merges what on a cluster, with nodes that die when a test says so, without processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_cli
from merge_cli.cluster.run import RayCluster
from merge_cli.engine.journal import Journal
from merge_cli.engine.merge import execute
from merge_cli.engine.merge_stats import MergeStats
from merge_cli.errors import Interrupted, NonFiniteError, ResourceError
from merge_cli.options import MergeOptions, Progress, ignore_progress
from tests.support.fake_ray import FakeRay
from tests.support.merges import digest, write_recipe
from tests.support.tiny import Family, write_model

OPTIONS = MergeOptions(device="cpu", ray="127.0.0.1:1")


def merge(
    ray: FakeRay,
    recipe: Any,
    out: Path,
    on_progress: Callable[[Progress], None] = ignore_progress,
    least: int = 1,
) -> MergeStats:
    """Merge on the nodes of a fake cluster; returns what the report is made of."""
    outcomes: list[MergeStats] = []
    execute(
        merge_cli.plan(recipe),
        out,
        OPTIONS,
        on_progress=on_progress,
        finish=lambda plan, prints, outcome, folder: outcomes.append(outcome),
        run=RayCluster(ray, least).run,
    )
    return outcomes[0]


@pytest.fixture
def alone(family: Family, tmp_path: Path) -> Path:
    """What one machine makes of `ties`."""
    options = MergeOptions(device="cpu")
    return merge_cli.merge(write_recipe(family, "ties"), tmp_path / "alone", options=options).path


def recipe_of(alone: Path) -> Path:
    return alone.parent / "recipe.yaml"


def test_all_nodes_work_and_the_statistics_are_those_of_one(alone: Path, tmp_path: Path) -> None:
    ray = FakeRay(["one", "two", "three"])
    outcome = merge(ray, recipe_of(alone), tmp_path / "out")
    assert digest(tmp_path / "out") == digest(alone)
    assert {*ray.merges} == {"one", "two", "three"}
    assert [node.name for node in outcome.nodes] == ["host one", "host three", "host two"]
    assert not any(node.lost for node in outcome.nodes)
    assert outcome.threads == 3
    assert all(sums.count for sums in outcome.stats)


def test_a_small_merge_takes_one_node(alone: Path, tmp_path: Path) -> None:
    ray = FakeRay(["one", "two", "three"])
    outcome = merge(ray, recipe_of(alone), tmp_path / "out", least=10**9)
    assert [node.name for node in outcome.nodes] == ["host one"]
    assert digest(tmp_path / "out") == digest(alone)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_lost_nodes_share_is_dealt_again(alone: Path, tmp_path: Path, number: int) -> None:
    """Also of a node that is lost while it reads the whole model for the others."""
    notes: list[str] = []
    ray = FakeRay(["one", "two", "three"], lambda node, count: count == number)
    outcome = merge(ray, recipe_of(alone), tmp_path / "out", lambda p: notes.append(p.note))
    assert len(ray.lost) == 1
    assert [node.lost for node in outcome.nodes].count(True) == 1
    assert any("was lost, others do its share" in note for note in notes)
    assert digest(tmp_path / "out") == digest(alone)


def test_when_all_are_lost_the_work_is_kept(alone: Path, tmp_path: Path) -> None:
    """Then it resumes on other nodes, and on this machine."""
    recipe, out = recipe_of(alone), tmp_path / "out"
    ray = FakeRay(["one", "two"], lambda node, count: count > 3)
    with pytest.raises(ResourceError, match=r"every node .* was lost — The same command resumes"):
        merge(ray, recipe, out)
    assert not out.exists()
    with pytest.raises(ResourceError):
        merge(FakeRay(["three"], lambda node, count: count > 2), recipe, out)
    outcome = merge(FakeRay(["four"]), recipe, out)
    assert outcome.resumed > 0
    assert digest(out) == digest(alone)
    with pytest.raises(ResourceError):
        merge(FakeRay(["five"], lambda node, count: count > 2), recipe, tmp_path / "here")
    here = merge_cli.merge(recipe, tmp_path / "here", options=MergeOptions(device="cpu"))
    assert here.report["cost"]["resumed_bytes"] > 0
    assert digest(here.path) == digest(alone)


def test_what_one_machine_has_begun_a_cluster_finishes(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = Journal.record, 0

    def record(*given: Any) -> None:
        nonlocal seen
        real(*given)
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", record)
        with pytest.raises(Interrupted):
            merge_cli.merge(recipe_of(alone), tmp_path / "out", options=MergeOptions(device="cpu"))
    outcome = merge(FakeRay(["one", "two"]), recipe_of(alone), tmp_path / "out")
    assert outcome.resumed > 0
    assert digest(tmp_path / "out") == digest(alone)


def test_ctrl_c_keeps_what_is_done(alone: Path, tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.total and progress.done > progress.total / 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="The same command resumes"):
        merge(FakeRay(["one", "two"]), recipe_of(alone), tmp_path / "out", press)
    assert merge(FakeRay(["one"]), recipe_of(alone), tmp_path / "out").resumed > 0
    assert digest(tmp_path / "out") == digest(alone)


def test_an_error_on_a_node_is_this_runs_error(family: Family, tmp_path: Path) -> None:
    name = "model.norm.weight"
    broken = {**family.models[1], name: torch.full_like(family.models[1][name], torch.nan)}
    write_model(tmp_path / "broken", broken)
    models = [str(tmp_path / "a"), str(tmp_path / "broken")]
    recipe = {"merge_method": "soup", "models": models}
    with pytest.raises(NonFiniteError, match=r"^node .*NaN or Inf.*model.norm.weight"):
        merge(FakeRay(["one", "two"]), recipe, tmp_path / "out")


def test_a_node_with_other_models_is_refused(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli.cluster import node

    class Others:
        content_fingerprint = "others"

    monkeypatch.setattr(node, "inputs_of", lambda plan: Others())
    with pytest.raises(merge_cli.errors.SourceError, match="not what the driver has under its"):
        merge(FakeRay(["one"]), recipe_of(alone), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(node, "work_key", lambda *given: "another version")
    with pytest.raises(ResourceError, match="has another version of torch"):
        merge(FakeRay(["one"]), recipe_of(alone), tmp_path / "out")


def test_a_storage_that_shows_nothing_ends_the_merge(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of dealing the same shares for ever."""
    from merge_cli.cluster.members import NodeLog

    monkeypatch.setattr(NodeLog, "read", lambda log: [])
    with pytest.raises(ResourceError, match=r"what node host one has written does not appear in"):
        merge(FakeRay(["one"]), recipe_of(alone), tmp_path / "out")
