"""Actors of a real Ray on this machine: two workers, of which one is killed in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.evolve_tiny import journal, run_search, write_family, write_search
from tests.support.paths import ROOT

ray = pytest.importorskip("ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_lost_actor_is_replaced_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    write_family(tmp_path)
    one = run_search(write_search(tmp_path, {"evaluations": 8}), tmp_path / "one")
    # What actors import, they find where this process does.
    paths = str(ROOT)
    monkeypatch.setenv("PYTHONPATH", paths)
    killed: list[int] = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        from merge_cli.evolve.workers import RayWorkers

        run = RayWorkers.run

        def killing(self: RayWorkers, jobs: object) -> object:
            for number, outcome in enumerate(run(self, jobs)):  # type: ignore[arg-type]
                yield outcome
                if number == 1 and not killed and self._idle:
                    killed.append(ray.get(self._idle[-1].pid.remote()))
                    os.kill(killed[0], signal.SIGKILL)

        monkeypatch.setattr(RayWorkers, "run", killing)
        recipe = write_search(tmp_path, {"evaluations": 8, "engine": "ray", "workers": 2})
        two = run_search(recipe, tmp_path / "two")
    finally:
        ray.shutdown()
    assert killed
    assert not any(one["error"] for one in two.record["history"])
    assert two.text == one.text

    def by_place(path: Path) -> object:
        return sorted(journal(path / "journal.jsonl")[1:], key=lambda x: (x["kind"], x["number"]))

    assert by_place(two.folder.path) == by_place(one.folder.path)
