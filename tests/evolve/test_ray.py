"""Actors of a real Ray on this machine: one that is killed in the middle, one that is broken."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_cli.evolve import workers
from merge_cli.evolve.jobs import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.workers import RayWorkers
from tests.support.evolve_tiny import journal, run_search, write_family, write_search
from tests.support.ray_nodes import Nodes

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("nodes")]  # Ray's own


def process_of(actor: object) -> int:
    """Runs in an actor: the number of its process."""
    return os.getpid()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return write_family(tmp_path)


def test_a_lost_actor_is_replaced_and_nothing_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run_search(write_search(folder, {"evaluations": 8}), folder / "one")
    run = RayWorkers.run
    killed: list[int] = []

    def killing(self: RayWorkers, jobs: Any) -> Iterator[EvaluationOutcome]:
        for number, outcome in enumerate(run(self, jobs)):
            yield outcome
            if number == 1 and not killed and self.pool._idle:
                killed.append(ray.get(self.pool._idle[-1].__ray_call__.remote(process_of)))
                os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(RayWorkers, "run", killing)
    recipe = write_search(folder, {"evaluations": 8, "engine": "ray", "workers": 2})
    two = run_search(recipe, folder / "two")
    assert killed
    assert not any(one["error"] for one in two.record["history"])
    assert two.text == one.text

    def by_place(path: Path) -> object:
        return sorted(journal(path / "journal.jsonl")[1:], key=lambda x: (x["kind"], x["number"]))

    assert by_place(two.folder.path) == by_place(one.folder.path)


def test_a_lost_node_is_not_waited_for(
    nodes: Nodes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is less room than there was, and nobody else gives any up."""
    one = run_search(write_search(folder, {"evaluations": 8}), folder / "one")
    nodes.add()
    run = RayWorkers.run

    def killing(self: RayWorkers, jobs: Any) -> Iterator[EvaluationOutcome]:
        for number, outcome in enumerate(run(self, jobs)):
            yield outcome
            if number == 0 and len(nodes.added) > 1:
                nodes.kill()

    monkeypatch.setattr(RayWorkers, "run", killing)
    recipe = write_search(folder, {"evaluations": 8, "engine": "ray", "workers": 3})
    two = run_search(recipe, folder / "two")
    assert not any(one["error"] for one in two.record["history"])
    assert two.text == one.text


def test_ray_says_what_goes_wrong_in_an_actor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def answer(self, job: EvaluationJob) -> EvaluationOutcome:
            raise ValueError("no such thing")

    monkeypatch.setattr(workers, "_evaluator", lambda setup, on_progress: Broken())
    recipe = write_search(folder, {"engine": "ray", "failures": 2, "evaluations": 4})
    with pytest.raises(
        Exception, match="process on the Ray cluster failed: ValueError: no such thing"
    ):
        run_search(recipe, folder / "out")
