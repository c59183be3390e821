"""`merge_method: auto` on a real Ray cluster: the same path and the same bytes, whoever is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge_cli
from merge_cli.cluster import connection, node
from merge_cli.cluster.actors import Resources, room_for
from merge_cli.cluster.connection import Node
from merge_cli.errors import Interrupted, ResourceError
from merge_cli.options import MergeOptions, Progress, ignore_progress
from tests.support.dam_tiny import config, write_data, write_models
from tests.support.merges import digest
from tests.support.ray_nodes import Nodes

pytest.importorskip("ray")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.xdist_group("ray")]
NAMES = ("a", "b")
HERE = MergeOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), names=("base", *NAMES), change=0.3)
    write_data(folder, NAMES, rows=100)
    document = {
        "merge_method": "auto",
        "base_model": "base",
        "models": [{"model": name, "data": f"{name}.jsonl"} for name in NAMES],
        "methods": ["soup", "fisher", "search", "dam"],
        "training": {"max_steps": 3, "max_length": 24, "top_k": 16, "held_out_tokens": 64},
        "statistics": {"examples": 8, "max_length": 24},
    }
    path = folder / "auto.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one machine makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGE_CLI_CACHE", str(folder / "cache"))
        report = merge_cli.merge(recipe, folder / "out", options=HERE).report
    return folder / "out", report["auto"]


def merge(recipe: Path, out: Path, nodes: Nodes, **more: Any) -> dict[str, Any]:
    on_progress = more.pop("on_progress", ignore_progress)
    options = replace(HERE, ray=nodes.cluster.address, **more)
    result = merge_cli.merge(recipe, out, options=options, on_progress=on_progress)
    return dict(result.report["auto"])


def same(auto: dict[str, Any], other: dict[str, Any]) -> None:
    """The path and the verdict, to the last bit."""
    for key in ("step", "loss", "losses", "kept", "tokens"):
        assert [line[key] for line in auto["path"]] == [line[key] for line in other["path"]]
    for key in ("best", "ended", "verdict", "sentence", "datasets"):
        assert auto[key] == other[key]


def test_steps_and_candidates_are_tried_on_the_nodes_and_one_is_killed(
    nodes: Nodes, recipe: Path, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    nodes.add()
    seen: list[Progress] = []

    def kill(progress: Progress) -> None:
        if progress.stage == "search" and not any(p.stage == "search" for p in seen):
            nodes.kill()
        seen.append(progress)

    auto = merge(recipe, tmp_path / "out", nodes, on_progress=kill)
    out, straight = alone
    same(auto, straight)
    assert digest(tmp_path / "out") == digest(out)
    assert auto["cost"]["processes"] == 3
    notes = [p.note for p in seen if not p.total]
    assert any("up to 3 at once, each with 1 CPU and 1 GB of memory" in note for note in notes)
    assert any(re.match("a process was lost, another one does .* again: ", n) for n in notes)
    assert {"gather", "train", "search", "auto", "merge"} <= {p.stage for p in seen}
    done = [p.done for p in seen if p.stage == "auto" and p.total]
    assert done == sorted(done)
    assert done[-1] == len(auto["path"])


def test_a_stopped_run_continues_without_the_cluster(
    nodes: Nodes, recipe: Path, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Learning that a node has begun is continued, too."""

    def press(progress: Progress) -> None:
        if progress.stage == "train":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="The same command continues"):
        merge(recipe, tmp_path / "out", nodes, on_progress=press)
    assert (tmp_path / "out.auto" / "dam.training").is_dir()
    auto = merge_cli.merge(recipe, tmp_path / "out", options=HERE).report["auto"]
    out, straight = alone
    same(auto, straight)
    assert digest(tmp_path / "out") == digest(out)


@pytest.mark.slow  # each run starts processes that import torch and transformers
def test_the_best_so_far_is_accepted(nodes: Nodes, recipe: Path, tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.stage == "search" and progress.done == 3:
            raise KeyboardInterrupt

    auto = merge(recipe, tmp_path / "out", nodes, accept_best=True, on_progress=press)
    assert auto["ended"] == "it was stopped, and the best so far accepted"
    lines = {line["step"]: line for line in auto["path"]}
    assert lines["search"]["note"] == "stopped: the best so far was accepted"
    merge_cli.merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again", options=HERE)
    assert digest(tmp_path / "again") == digest(tmp_path / "out")


def test_a_budget_is_of_the_whole(nodes: Nodes, recipe: Path, tmp_path: Path) -> None:
    """The soup shows how fast measuring is; nothing else begins before."""
    document = {**yaml.safe_load(recipe.read_text()), "budget": {"minutes": 0}}
    limited = recipe.with_name("limited.yaml")
    limited.write_text(yaml.safe_dump(document))
    auto = merge(limited, tmp_path / "out", nodes)
    assert auto["best"] == "uniform soup"
    assert auto["ended"].startswith("the budget is spent; left out: base, ")
    assert [line["loss"] is None for line in auto["path"]].count(False) == 1


def test_nodes_must_share_the_cache(
    nodes: Nodes, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are kept there. Told before anything is measured."""
    real = node.Probe

    def elsewhere(path: Path, *more: Any) -> Any:
        return real(tmp_path / "no" / path.name if path.parent.name == "cache" else path, *more)

    monkeypatch.setattr(connection, "Probe", elsewhere)
    with pytest.raises(ResourceError, match="node .* does not see .*Set MERGE_CLI_CACHE to a"):
        merge(recipe, tmp_path / "out", nodes)
    assert len((tmp_path / "out.auto" / "journal.jsonl").read_text().splitlines()) == 1


def test_a_model_that_no_node_has_room_for() -> None:
    node = Node("1", "one", 4, 0, 10 * 10**9)
    assert room_for([node, node], Resources(2, 0, 4 * 10**9)) == 4
    assert room_for([node], Resources(1, 0, 6 * 10**9)) == 1
    with pytest.raises(ResourceError, match=r"no node .* has 2 CPUs and 20 GB of memory"):
        room_for([node], Resources(2, 0, 20 * 10**9))
    with pytest.raises(ResourceError, match="1 CPU, 1 GPU and"):
        room_for([node], Resources(1, 1, 10**9))
