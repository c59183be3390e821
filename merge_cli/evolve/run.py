"""From a recipe that searches to a static one: resume, search, choose, compare, write it down."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merge_cli.calibration.run import calibrate
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.merge import fetch_inputs
from merge_cli.errors import Interrupted, MergeCliError
from merge_cli.evolve.beginning import evaluated_genomes, first_genome
from merge_cli.evolve.best_recipe import RecipeWriter
from merge_cli.evolve.greedy import Greedy
from merge_cli.evolve.jobs import EvaluationJob, Setup
from merge_cli.evolve.journal import BEST, Evaluations, SearchWorkspace, work_key
from merge_cli.evolve.loop import Asynchronous, Candidate, Loop, best_first
from merge_cli.evolve.objectives import Split, Values
from merge_cli.evolve.optimizers import make_optimizer
from merge_cli.evolve.plan import SearchPlan, plan_search
from merge_cli.evolve.record import gate, score_text
from merge_cli.evolve.references import References
from merge_cli.evolve.rivals import SearchOutcome, judge
from merge_cli.evolve.static import FISHER
from merge_cli.evolve.verdict import shown
from merge_cli.evolve.workers import make_workers
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.equal_tensors import compare
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe

Searcher = Loop | Asynchronous | Greedy


@dataclass(frozen=True)
class SearchResult:
    """What a search has left.

    Attributes:
        recipe: static, to be merged like any other.
        text: the same as best_recipe.yaml.
        record: for the report; see docs/evolve.md.
    """

    recipe: Recipe
    text: str
    record: dict[str, Any]
    folder: SearchWorkspace

    @property
    def attachments(self) -> dict[str, str]:
        """What goes into OUT beside the model: the recipe, and how it was found."""
        journal = self.folder.journal.read_text(encoding="utf-8")
        return {BEST: self.text, "search_journal.jsonl": journal}


def search(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    *,
    on_progress: OnProgress,
    require_improvement: bool = False,
) -> SearchResult:
    """Find what the plan's recipe leaves open; continue where a run was killed.

    Args:
        target: OUT; the journal is in OUT.search.
        require_improvement: refuse a result that is no better than every static merge.

    Raises:
        RecipeError, SourceError, MismatchError, ResourceError: see `plan_search`.
        MergeCliError: too many candidates in a row have failed.
        Interrupted: Ctrl-C or SIGTERM; the best so far is written, and the same command continues.
        GateError: `require_improvement` is not met. The journal is kept.
    """
    decided = plan_search(plan, options)
    fetch_inputs(plan, on_progress)
    compare(plan.compared)  # what would stop the merge of the winner
    inputs = inputs_of(plan)
    folder = SearchWorkspace(target, work_key(decided, options), fresh=options.fresh)
    with folder:
        run = _Run(decided, target, options, folder, on_progress)
        asked = [decided.search.evaluations, decided.search.finalists]
        record = folder.record()
        if record is None or record["asked"] != asked:
            record = {"asked": asked, **run.record()}
            inputs.verify_or(folder.discard)
            folder.finish(record)
        recipe = run.recipes.recipe_of(record["best"]["genome"], record["best"]["static"])
        best = record["best"]
        text = run.recipes.text_of(recipe, shown(record, best["score"], ".6g"), best["static"])
        folder.write_best(text)
    for line in record["warnings"]:
        on_progress(Progress("search", 0, 0, line))
    gate(record, require_improvement, folder.path)
    return SearchResult(recipe, text, record, folder)


class _Run:
    """One run of a search, from whatever the journal holds to the record."""

    def __init__(
        self,
        decided: SearchPlan,
        target: Path,
        options: MergeOptions,
        folder: SearchWorkspace,
        on_progress: OnProgress,
    ) -> None:
        self._decided, self._options = decided, options
        self.recipes = RecipeWriter(decided, target)
        self._folder, self._on_progress = folder, on_progress
        setup = Setup(decided.static(), decided.objective, options, decided.search.workers)
        self._workers = make_workers(decided.search, setup)
        self._evaluations = Evaluations(
            folder,
            self._workers,
            on_progress,
            failures=decided.search.failures,
            total=decided.evaluations,
            best=lambda: score_text(decided.objective.search, self._best()),
        )
        self._loop: Searcher | None = None
        self._statics: list[Candidate] = []
        self._references = References(decided.plan)

    def record(self) -> dict[str, Any]:
        """Search, choose, compare.

        Raises:
            Interrupted: with the best so far written down.
        """
        began = time.monotonic()
        try:
            self._loop = self._searcher()
            self._loop.run()
            best = self._choose()
            record = self._recorded(best, time.monotonic() - began)
        except (KeyboardInterrupt, Interrupted):
            raise self._interrupted() from None
        finally:
            self._workers.close()
        return record

    def _searcher(self) -> Searcher:
        decided = self._decided
        split = decided.objective.search
        # First, while no live model is in memory, and so that what is wrong with data is found now.
        for source in self._references.all():
            self._references.values(source, decided.objective.report)
        for share in decided.search.fidelity:
            self._references.base(split, share)
        base = self._references.base(split)
        for merge in decided.statics:
            if merge.name == FISHER:  # here, where it is shown; evaluators find it in the cache
                calibrate(make_plan(merge.recipe), self._options, self._on_progress)
        self._statics = self._evaluate_statics(split, base)
        if decided.space is None:
            return Greedy(decided.recipe, split, base, self._evaluations)
        goals = len(split.weighted)
        optimizer = make_optimizer(
            decided.search,
            decided.space,
            decided.recipe.seed,
            first_genome(decided, self._folder, self._statics, self._references),
            goals,
            evaluated_genomes(self._statics, goals),
        )
        kind = Asynchronous if decided.search.asynchronous else Loop
        return kind(
            decided.search,
            decided.space,
            split,
            partial(self._references.base, split),
            optimizer,
            self._evaluations,
            {
                tuple(decided.space.values(item.genome)): item
                for item in self._statics
                if item.genome
            },
        )

    def _evaluate_statics(self, split: Split, base: Values | None) -> list[Candidate]:
        """The merges that need no search; their numbers are negative."""
        statics = self._decided.statics
        numbers = range(-len(statics), 0)
        jobs = [EvaluationJob(i, m.recipe) for i, m in zip(numbers, statics, strict=True)]
        details = [{"merge": merge.name, "genome": merge.genome} for merge in statics]
        outcomes = self._evaluations.of("static", jobs, details)
        return [
            Candidate(
                outcome.number,
                -1,
                merge.genome,
                outcome,
                None if outcome.error else split.score(outcome.values, base),
                static=merge,
            )
            for merge, outcome in zip(statics, outcomes, strict=True)
        ]

    def _choose(self) -> Candidate:
        """The best candidate on the validation split, of the best on the search split."""
        assert self._loop is not None
        proposed = best_first(self._loop.candidates)
        ranked = best_first([*self._loop.candidates, *self._statics])
        if not ranked:
            message = "no candidate could be evaluated; the first one failed with: "
            failed = self._loop.candidates[0].outcome.error if self._loop.candidates else "nothing"
            raise MergeCliError(message + failed, where=str(self._folder.path))
        if isinstance(self._loop, Greedy):
            members = [float(i in self._loop.members) for i in range(len(self._decided.labels))]
            chosen = next(c for c in proposed if c.genome == members)
            statics = best_first(self._statics)
            is_worse = statics and statics[0].rank_key[:2] < chosen.rank_key[:2]
            return statics[0] if is_worse else chosen
        split = self._decided.objective.final
        if split is None:
            return ranked[0]
        # All static merges are compared, so that the result is not worse than the best of them.
        finalists = [*best_first(self._statics), *proposed[: self._decided.search.finalists]]
        jobs = [EvaluationJob(c.number, self._recipe(c), split.name) for c in finalists]
        about = [{"genome": c.genome} for c in finalists]
        outcomes = self._evaluations.of("validation", jobs, about)
        base = self._references.base(split)
        scored = [
            (
                (c.score.violation > 0 if c.score else True),
                *split.score(outcome.values, base).order,
                rank,
                c,
            )
            for rank, (c, outcome) in enumerate(zip(finalists, outcomes, strict=True))
            if not outcome.error
        ]
        return min(scored, key=lambda item: item[:-1])[-1] if scored else ranked[0]

    def _recipe(self, candidate: Candidate) -> Recipe:
        return self.recipes.recipe_of(
            candidate.genome, candidate.static.name if candidate.static else ""
        )

    def _recorded(self, best: Candidate, seconds: float) -> dict[str, Any]:
        """The report's record: the result beside what needs no search, on the report's rows."""
        assert self._loop is not None
        outcome = SearchOutcome(
            self._decided,
            tuple(self._loop.candidates),
            tuple(self._statics),
            best,
            self._loop.ended,
        )
        return judge(
            outcome,
            self._recipe(best),
            self._evaluations,
            self._references,
            lines=self._folder.lines,
            seconds=seconds,
            options=self._options,
        )

    def _best(self) -> Candidate | None:
        proposed = self._loop.candidates if self._loop is not None else []
        ranked = best_first([*self._statics, *proposed])
        return ranked[0] if ranked else None

    def _interrupted(self) -> Interrupted:
        """With the best that the journal knows; references come before candidates."""
        base = partial(self._references.base, self._decided.objective.search)
        return self.recipes.interrupted(self._folder, base)
