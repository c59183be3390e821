"""The journal of a search: every evaluation is written to disk, and never repeated.

    OUT.search/journal.jsonl     the search's key, then one line for each evaluation
    OUT.search/best_recipe.yaml  the best so far, or the result
    OUT.search/search.json       the record, when the search has ended

There is no other state: optimizers are asked and told again from the journal. A search is
identified by a fingerprint of everything that its scores depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.calibration.plan import CalibrationPlan
from merge_cli.checkpoint.fingerprint import auxiliary_fingerprint
from merge_cli.engine.device import choose_device
from merge_cli.engine.merge import verified_fingerprints
from merge_cli.errors import CorruptFileError, MergeCliError
from merge_cli.evolve.jobs import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.plan import SearchPlan, plan_search
from merge_cli.evolve.workers import Workers
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.recipe.search import INDIFFERENT, Search
from merge_cli.recipe.values import Parameter
from merge_cli.system.raw_io import replace_file
from merge_cli.system.workspace import JournalWorkspace

if TYPE_CHECKING:
    pass


BEST, _RECORD = "best_recipe.yaml", "search.json"
Line = dict[str, Any]
# Fields that change how long a search runs, or who evaluates, but no candidate's score.
_NOT_IN_KEY = {"evaluations", "finalists", *INDIFFERENT}  # a search goes on with more of them
_FORMAT = 3
_CONTRADICTION = "the journal has another candidate with this number than this version would try"


class SearchWorkspace(JournalWorkspace):
    """OUT.search: a context manager that holds its lock, with a journal of candidates.

    Args:
        target: OUT.
        key: of the search; the folder of another search is refused.
        fresh: discard an earlier search.
    """

    def __init__(self, target: Path, key: str, *, fresh: bool = False) -> None:
        super().__init__(target, ".search", "search", key, fresh=fresh)

    def write_best(self, text: str) -> Path:
        """Write the best recipe so far."""
        replace_file(self.path / BEST, text.encode())
        return self.path / BEST

    def finish(self, record: Line) -> None:
        """The search has ended: what it found is known without the journal."""
        self.write_record(_RECORD, self.key, record)

    def record(self) -> Line | None:
        """The record of a search that has ended; None while it has not."""
        return self.read_record(_RECORD, self.key)


def search_fingerprint(plan: Plan, device: str) -> str:
    """A fingerprint of everything that a search's result depends on.

    Raises:
        as `plan_search` does.
    """
    options = MergeOptions(device=device)
    search_plan = plan_search(plan, options)
    counts = f"{search_plan.search.evaluations} {search_plan.search.finalists}"
    return f"{work_key(search_plan, options)} {counts}"


def work_key(search_plan: SearchPlan, options: MergeOptions) -> str:
    """A fingerprint of everything that the scores depend on."""
    recipe, plan = search_plan.recipe, search_plan.plan
    options_of_search = {
        f.name: repr(getattr(search_plan.search, f.name))
        for f in fields(Search)
        if f.name not in _NOT_IN_KEY
    }
    splits = {
        name: {
            "tasks": [task.identity() for task in split.spec.tasks],
            "goals": [repr(goal) for goal in split.goals],
            "how": [
                split.spec.seed,
                split.spec.max_length,
                split.spec.batch_tokens,
                split.spec.dtype,
            ],
        }
        for name, split in search_plan.objective.splits.items()
    }
    content = {
        "format": _FORMAT,
        "versions": [version(package) for package in ("merge-cli", "torch", "transformers")],
        "method": recipe.merge_method,
        "batch": search_plan.population,
        "dials": options_of_search,
        "static": [_plain(recipe.parameters), *(_plain(spec.parameters) for spec in recipe.models)],
        "seed": recipe.seed,
        "dtype": recipe.output_dtype,
        "inputs": verified_fingerprints(plan),
        "models": [str(spec.model) for spec in recipe.models],
        "tokenizer": auxiliary_fingerprint(plan.sources[plan.tokenizer_index].root),
        "splits": splits,
        "starts": [merge.genome for merge in search_plan.statics],
        "examples": _examples(search_plan.calibration),
        "device": choose_device(options.device).kind,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _examples(calibration: CalibrationPlan | None) -> list[str]:
    """What Fisher merging looks at, and how; empty where models have no data."""
    if calibration is None:
        return []
    return [repr(calibration.statistics), *(part.examples.digest for part in calibration.parts)]


def _plain(parameters: Mapping[str, Parameter]) -> list[str]:
    return [repr((name, parameter.setting)) for name, parameter in sorted(parameters.items())]


class Evaluations:
    """The evaluations of a search, through its journal.

    Args:
        failures: this many in a row end the search.
        total: expected evaluations, for progress.
        best: a note on the best candidate so far.

    Attributes:
        reused: evaluations that were in the journal.
    """

    def __init__(
        self,
        folder: SearchWorkspace,
        workers: Workers,
        on_progress: OnProgress,
        *,
        failures: int,
        total: int,
        best: Callable[[], str] = lambda: "",
    ) -> None:
        self._folder, self._workers, self._show = folder, workers, on_progress
        self._limit, self._total, self._best = failures, total, best
        self._recorded = {
            (line["kind"], line["number"], line["share"]): line for line in folder.lines
        }
        self._failed = 0
        self.count = self.reused = 0

    def of(
        self, kind: str, jobs: Sequence[EvaluationJob], about: Sequence[Mapping[str, Any]]
    ) -> list[EvaluationOutcome]:
        """The jobs' outcomes, in their order.

        Args:
            kind: of the lines: static, candidate, validation or report.
            about: further fields of each job's line; `genome` must agree with the journal.

        Raises:
            MergeCliError: too many in a row have failed.
            CorruptFileError: the journal has another genome.
        """
        outcomes: dict[int, EvaluationOutcome] = {}
        details = {job.number: dict(detail) for job, detail in zip(jobs, about, strict=True)}
        missing = []
        for job in jobs:
            line = self._recorded.get((kind, job.number, job.share))
            is_same = line is not None and line.get("genome") == details[job.number].get("genome")
            # With more evaluations than last time, another candidate may be reported.
            if line is None or (kind != "candidate" and not is_same):
                missing.append(job)
                continue
            if not is_same:
                raise self.contradicts(job.number)
            outcomes[job.number] = EvaluationOutcome.from_json(job.number, line)
            self.reused += 1
            self._note(outcomes[job.number], kind)
        for outcome in self.stream(kind, ((job, details[job.number]) for job in missing)):
            outcomes[outcome.number] = outcome
        return [outcomes[job.number] for job in jobs]

    def stream(
        self, kind: str, jobs: Iterable[tuple[EvaluationJob, Mapping[str, Any]]]
    ) -> Iterator[EvaluationOutcome]:
        """Outcomes of jobs that are not in the journal, as they are ready.

        A job is taken when a worker is free, after the caller has taken earlier outcomes.
        """
        pending: dict[int, tuple[EvaluationJob, Mapping[str, Any]]] = {}

        def upcoming() -> Iterator[EvaluationJob]:
            for job, detail in jobs:
                pending[job.number] = job, detail
                yield job

        for outcome in self._workers.run(upcoming()):
            job, detail = pending.pop(outcome.number)
            line = {
                "kind": kind,
                "number": job.number,
                "share": job.share,
                **detail,
                **outcome.to_json(),
            }
            self._folder.append(line)
            self._note(outcome, kind)
            yield outcome

    def asked(self, number: int, genome: list[float]) -> None:
        """Record a candidate before its evaluation starts."""
        self._folder.append({"kind": "asked", "number": number, "share": 1.0, "genome": genome})

    def replay(self) -> Iterator[tuple[str, int, list[float], EvaluationOutcome | None]]:
        """Proposals and results in the journal, in their order.

        Yields:
            kind (asked or candidate), number, genome, outcome of a candidate.
        """
        for line in list(self._folder.lines):
            if line["kind"] == "asked":
                yield "asked", line["number"], line["genome"], None
            elif line["kind"] == "candidate":
                outcome = EvaluationOutcome.from_json(line["number"], line)
                self.reused += 1
                self._note(outcome, "candidate")
                yield "candidate", line["number"], line["genome"], outcome

    def contradicts(self, number: int) -> CorruptFileError:
        """An error: the journal has another candidate than the optimizer proposes."""
        where, hint = str(self._folder.path), "Start over with --fresh."
        return CorruptFileError(f"candidate {number}: {_CONTRADICTION}", file=where, hint=hint)

    def _note(self, outcome: EvaluationOutcome, kind: str) -> None:
        self.count += 1
        self._failed = self._failed + 1 if outcome.error else 0
        if kind in ("static", "candidate"):
            note = outcome.error.partition("\n")[0] or self._best()
            self._show(Progress("search", self.count, self._total, note, "candidates"))
        if self._failed >= self._limit:
            message = f"{self._failed} candidates in a row have failed, the last one with: "
            hint = "Once the reason is gone, the same command with --fresh searches again."
            raise MergeCliError(message + outcome.error, where=str(self._folder.path), hint=hint)
