"""Merges on a real Ray cluster of several nodes: the same bytes, whoever is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.cluster import run as cluster_run
from merge_cli.cluster.connection import check_storage, nodes_of
from merge_cli.cluster.tasks import task_cluster
from merge_cli.engine.made_before import read_report
from merge_cli.errors import Interrupted, ResourceError, SourceError, UsageError
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning.chunks import cut_chunks
from tests.support.evolve_tiny import write_family
from tests.support.merges import digest, write_recipe
from tests.support.ray_nodes import Nodes
from tests.support.tiny import Family, read_model, write_model

ray = pytest.importorskip("ray")
# Ray's own warnings; and one worker of pytest starts the only cluster.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.xdist_group("ray")]


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small model is many of them."""
    monkeypatch.setattr(cluster_run, "LEAST_BYTES", 1)


def merge(recipe: Any, out: Path, nodes: Nodes | None = None, **more: Any) -> dict[str, Any]:
    """Merge, on the cluster if one is given; returns the report."""
    on_progress = more.pop("on_progress", None)
    address = None if nodes is None else nodes.cluster.address
    options = MergeOptions(ray=address, **more)
    return merge_cli.merge(recipe, out, options=options, on_progress=on_progress).report


def test_two_nodes_write_the_bytes_of_one_machine(
    nodes: Nodes, family: Family, tmp_path: Path
) -> None:
    """`ties` over the whole model: one node reads all of it, the others get what it has learned."""
    recipe = write_recipe(family, "ties model")
    alone = merge(recipe, tmp_path / "alone")
    notes: list[str] = []
    report = merge(recipe, tmp_path / "out", nodes, on_progress=lambda p: notes.append(p.note))
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")
    both = report["cost"]["nodes"]
    assert len(both) == 2
    assert all(node["bytes"] > 0 for node in both)
    written = sum(tensor.nbytes for tensor in read_model(tmp_path / "out").values())
    assert sum(node["bytes"] for node in both) == written
    assert report["statistics"] == alone["statistics"]
    assert report["work"] == alone["work"]
    assert any(note.endswith("has read the whole model for the others") for note in notes)
    assert {path.name for path in tmp_path.iterdir()} >= {"alone", "out"}
    assert not [*tmp_path.glob("*.partial*"), *tmp_path.glob(".merge-cli-probe*")]


def test_what_is_interrupted_resumes_without_the_cluster(
    nodes: Nodes, family: Family, tmp_path: Path
) -> None:
    """A sweep: its variants are shared by the nodes in one pass, too."""
    sweep = {str(scale): {"parameters": {"lambda": scale}} for scale in (0.3, 0.9)}
    recipe = family.recipe("dare_ties", sweep=sweep)
    merge(recipe, tmp_path / "alone")
    resumed: list[int] = []

    def press(progress: Progress) -> None:
        if progress.total and progress.done > progress.total / 4:
            raise KeyboardInterrupt

    def see(progress: Progress) -> None:
        if progress.note == "resumed":
            resumed.append(progress.done)

    with pytest.raises(Interrupted, match="The same command resumes"):
        merge(recipe, tmp_path / "out", nodes, on_progress=press)
    assert not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "out", on_progress=see)
    assert len(resumed) == 1
    assert resumed[0] > 0
    for name in sweep:
        assert digest(tmp_path / "out" / name) == digest(tmp_path / "alone" / name)


def test_storage_that_a_node_does_not_have(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe is where the driver writes it; a node that looks elsewhere has other storage."""
    from merge_cli.cluster import connection, node

    real = node.Probe

    def elsewhere(path: Path, content: bytes, offset: int, answer: bytes) -> Any:
        return real(tmp_path / "not mounted" / path.name, content, offset, answer)

    monkeypatch.setattr(connection, "Probe", elsewhere)
    with pytest.raises(ResourceError, match=r"node .* does not see .*not mounted.*; node .*"):
        check_storage(ray, nodes_of(ray), tmp_path)
    other = tmp_path / "other"
    other.write_bytes(bytes(300))
    monkeypatch.setattr(connection, "Probe", lambda path, *more: real(other, *more))
    with pytest.raises(ResourceError, match="reads something else"):
        check_storage(ray, nodes_of(ray), tmp_path)
    assert [*tmp_path.iterdir()] == [other]


def test_gpus_that_the_cluster_does_not_have(nodes: Nodes, family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(family, "soup")
    with pytest.raises(ResourceError, match="no node of the Ray cluster has a GPU"):
        merge(recipe, tmp_path / "out", nodes, device="cuda")
    with pytest.raises(UsageError, match="cannot be chosen on a cluster"):
        merge(recipe, tmp_path / "out", nodes, device="cuda:1")


def test_tasks(nodes: Nodes) -> None:
    """Results as they come, by number; an error of this program is raised as what it is."""
    least = min(node.memory for node in nodes_of(ray))
    for wanted, reserved in ((10**6, 10**6), (10**18, least)):
        with task_cluster(nodes.cluster.address, "auto", None, wanted) as cluster:
            assert (cluster.kind, cluster.cpus, cluster.memory) == ("cpu", 1, reserved)
    with task_cluster(nodes.cluster.address, "auto", None, 10**6) as cluster:
        answers = dict(cluster.map(lambda word, times: word * times, [("a", 1), ("b", 2)]))
        assert answers == {0: "a", 1: "bb"}

        def fail(word: str) -> None:
            raise SourceError(word, model="base")

        with pytest.raises(SourceError, match="broken — base"):
            list(cluster.map(fail, [("broken",)]))
        with pytest.raises(
            ResourceError, match="a task on the Ray cluster failed: ValueError: invalid literal"
        ):
            list(cluster.map(int, [("no number",)]))
    assert ray.is_initialized()


@pytest.mark.slow
def test_models_are_compared_on_the_nodes(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges are shared, and each evaluation is a task; the numbers are those of one machine."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    folder = write_family(tmp_path)
    recipe = folder / "half.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "soup", "models": ["a", "b"]}))
    data, out, seen = folder / "a.validation.jsonl", folder / "out", []
    result = merge_cli.compare(
        [recipe],
        [data],
        out,
        options=["--device", "cpu", "--quiet"],
        ray=nodes.cluster.address,
        on_progress=lambda progress: seen.append(progress.stage),
    )
    assert seen.count("evaluated") == len(result.record["models"]) == 3
    (made,) = (path for path in (out / "models").iterdir() if path.is_dir())
    for model in result.record["models"]:
        path = made if model["role"] == "recipe" else folder / model["name"]
        alone = merge_cli.evaluate(path, [data], cache=False, device="cpu")
        (task,) = model["scores"]
        score = model["scores"][task]["value"]
        assert alone[task].value == pytest.approx(score, rel=1e-5)
    assert read_report(made)["cost"]["nodes"]


def test_three_nodes_one_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    """In the middle of a merge whose largest tensor is several chunks."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.weight": (512, 1024) for i in range(24)}
    shapes = {"model.embed_tokens.weight": (40_000, 1024), **tensors}
    models = []
    for name in "ab":
        weights = {k: torch.randn(*s, generator=generator).bfloat16() for k, s in shapes.items()}
        models.append(str(write_model(tmp_path / name, weights)))
    recipe = merge_cli.load_recipe({"merge_method": "slerp", "models": models,
                                    "parameters": {"t": 0.4}})  # fmt: skip
    tasks = merge_cli.plan(recipe).tasks
    assert len([c for c in cut_chunks(tasks) if tasks[c.task].name in shapes]) > len(shapes)
    merge(recipe, tmp_path / "alone")
    nodes.add()
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.total and progress.done > progress.total / 3 and not killed:
            killed.append(progress.done)
            nodes.kill()

    report = merge(recipe, tmp_path / "out", nodes, on_progress=kill)
    assert killed
    assert len(report["cost"]["nodes"]) == 3
    assert [node["lost"] for node in report["cost"]["nodes"]].count(True) == 1
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")
