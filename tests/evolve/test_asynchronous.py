"""A search without generations: nobody waits, and the journal is all the state there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import CorruptFileError, RecipeError, UsageError
from merge_cli.evaluation.run import evaluate
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.evolve.jobs import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.journal import Evaluations, SearchWorkspace
from merge_cli.evolve.loop import Asynchronous, Loop
from merge_cli.evolve.objectives import CandidateScore, Goal, Split, Value
from merge_cli.evolve.optimizers import make_optimizer
from merge_cli.evolve.ranking import Ranking
from merge_cli.evolve.space import Space
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.search import Search
from merge_cli.system.records import read_lines, seal
from merge_cli.system.workspace import MARK
from tests.support.evolve_tiny import journal, run_search, write_family, write_search

OPTIMIZERS = ["cma-es", "random", "tpe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_command_searches_and_resumes_from_any_byte(folder: Path) -> None:
    recipe = write_search(folder, {"asynchronous": True, "evaluations": 10})
    whole = run_search(recipe, folder / "whole")
    file = whole.folder.path / "journal.jsonl"
    lines = journal(file)
    kinds = [line.get("kind") for line in lines]
    assert kinds.count("asked") == kinds.count("candidate") == 10
    raw = file.read_bytes()
    for share in (0.2, 0.5, 0.8):
        part = folder / f"part{share}.search"
        part.mkdir()
        (part / MARK).touch()
        (part / "journal.jsonl").write_bytes(raw[: int(share * len(raw))])
        again = run_search(recipe, folder / f"part{share}")
        assert again.text == whole.text
        assert journal(part / "journal.jsonl") == lines


def test_two_processes_and_another_way_of_counting(folder: Path) -> None:
    recipe = write_search(folder, {"asynchronous": True, "evaluations": 6, "workers": 2})
    found = run_search(recipe, folder / "out")
    cost = found.record["cost"]
    assert cost["evaluations"] - cost["static_evaluations"] == 6
    numbers = {line["number"] for line in found.folder.lines if line["kind"] == "candidate"}
    assert numbers == set(range(6))


class Threads:
    """Workers whose jobs take as long as the test says; at most `count` at once."""

    def __init__(self, count: int, seconds: dict[int, float]) -> None:
        self._count, self._seconds = count, seconds
        self.most = self.waits = 0

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        coming = iter(jobs)
        busy: dict[int, threading.Thread] = {}
        done = threading.Condition()
        finished: list[EvaluationOutcome] = []

        def work(job: EvaluationJob, genome: float) -> None:
            time.sleep(self._seconds.get(job.number, 0.0))
            with done:
                value = {"t": {"loss": Value((genome - 0.3) ** 2, "lower")}}
                finished.append(EvaluationOutcome(job.number, value))
                done.notify()

        while True:
            while len(busy) < self._count and (job := next(coming, None)) is not None:
                weight: Any = job.recipe.models[0].parameters["weight"].setting
                busy[job.number] = threading.Thread(target=work, args=(job, weight))
                busy[job.number].start()
            self.most = max(self.most, len(busy))
            if not busy:
                return
            with done:
                while not finished:
                    done.wait()
                outcome = finished.pop(0)
            busy.pop(outcome.number).join()
            yield outcome

    def close(self) -> None:
        pass


def search_with(
    folder: Path, workers: Threads, optimizer: str, evaluations: int = 24, limit: int | None = None
) -> tuple[Asynchronous, SearchWorkspace]:
    changes = {"optimizer": optimizer, "evaluations": evaluations, "asynchronous": True}
    recipe = make_plan(load_recipe(write_search(folder, changes))).recipe
    search = recipe.search or Search()
    space = Space(recipe, 2)
    split = Split("search", None, (Goal("t"),))  # type: ignore[arg-type]
    kept = SearchWorkspace(folder / "run", "key")
    kept.__enter__()
    evaluations_ = Evaluations(kept, workers, lambda progress: None, failures=8, total=24)
    loop = Asynchronous(
        search, space, split, lambda share: None,
        make_optimizer(search, space, 0, [0.5] * len(space), 1), evaluations_,
    )  # fmt: skip
    if limit is None:
        loop.run()
    else:  # killed: what happened until then is in the journal
        stream = evaluations_.stream

        def cut(kind: str, jobs: object) -> Iterator[EvaluationOutcome]:
            for number, outcome in enumerate(stream(kind, jobs)):  # type: ignore[arg-type]
                if number == limit:
                    raise KeyboardInterrupt
                yield outcome

        evaluations_.stream = cut  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    return loop, kept


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nobody_waits_for_the_slowest(folder: Path, optimizer: str) -> None:
    workers = Threads(3, {0: 0.4})
    loop, kept = search_with(folder, workers, optimizer)
    order = [c.number for c in loop.candidates]
    assert sorted(order) == list(range(24))
    assert workers.most == 3
    assert order.index(0) > 4  # a generation of four would have waited for it
    kept.__exit__(None, None, None)
    # The journal says all of it: asked and told again, the same candidates, without any worker.
    again, kept = search_with(folder, Threads(0, {}), optimizer)
    assert [c.genome for c in again.candidates] == [c.genome for c in loop.candidates]
    kept.__exit__(None, None, None)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_out_is_evaluated_again(folder: Path, optimizer: str) -> None:
    slow = {number: 0.01 * (number % 3) for number in range(24)}
    cut, kept = search_with(folder, Threads(3, slow), optimizer, limit=9)
    asked = [line["genome"] for line in kept.lines if line["kind"] == "asked"]
    assert len(cut.candidates) == 9
    assert len(asked) > 9
    kept.__exit__(None, None, None)
    loop, kept = search_with(folder, Threads(2, {}), optimizer)
    genomes = {c.number: c.genome for c in loop.candidates}
    assert [genomes[i] for i in range(len(asked))] == asked
    assert sorted(genomes) == list(range(24))
    kept.__exit__(None, None, None)


def test_cma_es_finds_the_bottom_one_at_a_time(folder: Path) -> None:
    loop, kept = search_with(folder, Threads(3, {}), "cma-es", evaluations=80)
    best = min(c.score.total for c in loop.candidates if c.score)
    assert best < 1e-3
    kept.__exit__(None, None, None)


def test_another_candidate_in_the_journal_is_told(folder: Path) -> None:
    _, kept = search_with(folder, Threads(1, {}), "random")
    kept.__exit__(None, None, None)
    file = kept.path / "journal.jsonl"
    lines, _ = read_lines(file.read_bytes())
    lines[1]["genome"][0] += 0.25
    file.write_bytes(b"".join(map(seal, lines)))
    with pytest.raises(CorruptFileError, match="candidate 0: the journal has another candidate"):
        search_with(folder, Threads(1, {}), "random")


def test_generations_cannot_be_thinned_out_without_generations(folder: Path) -> None:
    recipe = write_search(folder, {"asynchronous": True, "fidelity": [0.5]})
    with pytest.raises(RecipeError, match="an asynchronous search has none"):
        load_recipe(recipe)


@pytest.mark.parametrize("size", [1.0, 3e5, 1e12])
def test_ranks_keep_their_order_whatever_the_size_of_a_metric(size: float) -> None:
    ranking = Ranking(1)
    fine = [CandidateScore(x * size, (x * size,)) for x in (0.1, 0.9)]
    broken = [CandidateScore(0.1 * size, (0.1 * size,), v) for v in (1e-3, 1.0, 1e9)]
    for score in (*fine, *broken):
        ranking.see(score)
    told = [
        *(ranking.of(score) for score in fine),
        *(ranking.of(fine[0], stages) for stages in (1, 2)),
        *(ranking.of(score) for score in broken),
        ranking.failed(),
    ]
    ranks = [rank for rank, _ in told]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == len(ranks)
    assert [parts[0] for _, parts in told] == sorted(parts[0] for _, parts in told)


def test_a_start_follows_the_models_not_their_order(folder: Path) -> None:
    recipe = make_plan(load_recipe(write_search(folder))).recipe
    space = Space(recipe, 2)
    start = folder / "start.yaml"
    start.write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        "  - {model: ./b, parameters: {weight: 0.3}}\n  - {model: a, parameters: {weight: 1.2}}\n"
    )
    assert space.values(space.start_from(load_recipe(start))) == [1.2, 0.3]
    start.write_text(start.read_text().replace("./b", "c"))
    with pytest.raises(UsageError, match="not b, but c"):
        space.start_from(load_recipe(start))


def test_constraints_compare_on_the_same_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On half of the rows a candidate is compared with the base on that half."""
    seen: set[tuple[float, float]] = set()
    score = Loop._score

    def spy(self: Loop, outcome: EvaluationOutcome, share: float) -> CandidateScore:
        base = self.base(share)
        assert base is not None
        seen.add((share, next(iter(base.values()))["loss"].value))
        return score(self, outcome, share)

    monkeypatch.setattr(Loop, "_score", spy)
    objective = [{"task": "loss", "data": "a.search.jsonl", "no_worse_than": "base"}]
    changes = {"fidelity": [0.5], "evaluations": 4}
    run_search(write_search(folder, changes, objective=objective), folder / "out")

    def on(rows: int) -> float:
        task = LossTask(name="a", data=folder / "a.search.jsonl", limit=rows)
        return evaluate(folder / "base", [task], device="cpu", seed=3).tasks["a"].value

    assert seen == {(0.5, on(2)), (1.0, on(4))}
