"""Jobs through the journal: what it knows is not evaluated again, what is new is written first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge_cli.engine.options import Progress, Show
from merge_cli.errors import CorruptFileError, MergeCliError
from merge_cli.evolve.evaluator import Job, Outcome
from merge_cli.evolve.journal import SearchFolder
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
        self, folder: SearchFolder, workers: Workers, show: Show, *, failures: int, total: int,
        best: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        self._folder, self._workers, self._show = folder, workers, show
        self._limit, self._total, self._best = failures, total, best
        self._known = {(line["kind"], line["number"], line["share"]): line for line in folder.lines}
        self._failed = 0
        self.count = self.reused = 0

    def of(
        self, kind: str, jobs: Sequence[Job], about: Sequence[Mapping[str, Any]]
    ) -> list[Outcome]:
        """The jobs' outcomes, in their order.

        Args:
            kind: candidate, validation or report: what the lines are for.
            about: for each job, what else its line says; `genome` must agree with the journal.

        Raises:
            MergeCliError: too many in a row have failed.
            CorruptFileError: the journal says otherwise.
        """
        found: dict[int, Outcome] = {}
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
                where, hint = str(self._folder.path), "Start over with --fresh."
                raise CorruptFileError(f"candidate {job.number}: {_OTHER}", file=where, hint=hint)
            found[job.number] = Outcome.from_json(job.number, line)
            self.reused += 1
            self._note(found[job.number], kind)
        for outcome in self._workers.run(missing):
            job = next(one for one in missing if one.number == outcome.number)
            line = {"kind": kind, "number": job.number, "share": job.share,
                    **said[job.number], **outcome.to_json()}  # fmt: skip
            self._folder.append(line)
            found[job.number] = outcome
            self._note(outcome, kind)
        return [found[job.number] for job in jobs]

    def _note(self, outcome: Outcome, kind: str) -> None:
        self.count += 1
        self._failed = self._failed + 1 if outcome.error else 0
        if kind == "candidate":
            note = outcome.error.partition("\n")[0] or self._best()
            self._show(Progress("search", self.count, self._total, note, "candidates"))
        if self._failed >= self._limit:
            what = f"{self._failed} candidates in a row have failed, the last one with: "
            hint = "Once the reason is gone, the same command with --fresh searches again."
            raise MergeCliError(what + outcome.error, where=str(self._folder.path), hint=hint)
