"""Jobs through the journal: what it knows is not evaluated again, what is new is written first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from merge_cli.engine.options import OnProgress, Progress
from merge_cli.errors import CorruptFileError, MergeCliError
from merge_cli.evolve.evaluator import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.journal import SearchWorkspace
from merge_cli.evolve.workers import Workers

_OTHER = "the journal has another candidate at this place than this version would try"


class Evaluations:
    """All evaluations of a search.

    Args:
        failures: so many failed ones in a row end the search.
        total: evaluations that are expected, for progress.
        best: what to say of the search so far.

    Attributes:
        reused: how many the journal knew.
    """

    def __init__(
        self,
        folder: SearchWorkspace,
        workers: Workers,
        show: OnProgress,
        *,
        failures: int,
        total: int,
        best: Callable[[], str] = lambda: "",
    ) -> None:
        self._folder, self._workers, self._show = folder, workers, show
        self._limit, self._total, self._best = failures, total, best
        self._known = {(line["kind"], line["number"], line["share"]): line for line in folder.lines}
        self._failed = 0
        self.count = self.reused = 0

    def of(
        self, kind: str, jobs: Sequence[EvaluationJob], about: Sequence[Mapping[str, Any]]
    ) -> list[EvaluationOutcome]:
        """The jobs' outcomes, in their order.

        Args:
            kind: candidate, validation or report: what the lines are for.
            about: for each job, what else its line says; `genome` must agree with the journal.

        Raises:
            MergeCliError: too many in a row have failed.
            CorruptFileError: the journal says otherwise.
        """
        found: dict[int, EvaluationOutcome] = {}
        said = {job.number: dict(more) for job, more in zip(jobs, about, strict=True)}
        missing = []
        for job in jobs:
            line = self._known.get((kind, job.number, job.share))
            same = line is not None and line.get("genome") == said[job.number].get("genome")
            # With more evaluations than last time another candidate may be the one to report on.
            if line is None or (kind != "candidate" and not same):
                missing.append(job)
                continue
            if not same:
                raise self.contradicts(job.number)
            found[job.number] = EvaluationOutcome.from_json(job.number, line)
            self.reused += 1
            self._note(found[job.number], kind)
        for outcome in self.stream(kind, ((job, said[job.number]) for job in missing)):
            found[outcome.number] = outcome
        return [found[job.number] for job in jobs]

    def stream(
        self, kind: str, jobs: Iterable[tuple[EvaluationJob, Mapping[str, Any]]]
    ) -> Iterator[EvaluationOutcome]:
        """Jobs that the journal does not know, with what else their lines say; as they come.

        A job is taken when a worker is free for it, after what was yielded before has been seen.
        """
        out: dict[int, tuple[EvaluationJob, Mapping[str, Any]]] = {}

        def coming() -> Iterator[EvaluationJob]:
            for job, about in jobs:
                out[job.number] = job, about
                yield job

        for outcome in self._workers.run(coming()):
            job, about = out.pop(outcome.number)
            line = {
                "kind": kind,
                "number": job.number,
                "share": job.share,
                **about,
                **outcome.to_json(),
            }
            self._folder.append(line)
            self._note(outcome, kind)
            yield outcome

    def asked(self, number: int, genome: list[float]) -> None:
        """Write down that a candidate is out, before it is."""
        self._folder.append({"kind": "asked", "number": number, "share": 1.0, "genome": genome})

    def replay(self) -> Iterator[tuple[str, int, list[float], EvaluationOutcome | None]]:
        """What was asked and what came of it, in the order in which it happened.

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
        """The journal has another candidate than the optimizer proposes."""
        where, hint = str(self._folder.path), "Start over with --fresh."
        return CorruptFileError(f"candidate {number}: {_OTHER}", file=where, hint=hint)

    def _note(self, outcome: EvaluationOutcome, kind: str) -> None:
        self.count += 1
        self._failed = self._failed + 1 if outcome.error else 0
        if kind == "candidate":
            note = outcome.error.partition("\n")[0] or self._best()
            self._show(Progress("search", self.count, self._total, note, "candidates"))
        if self._failed >= self._limit:
            what = f"{self._failed} candidates in a row have failed, the last one with: "
            hint = "Once the reason is gone, the same command with --fresh searches again."
            raise MergeCliError(what + outcome.error, where=str(self._folder.path), hint=hint)
