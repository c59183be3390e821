"""Greedy soup: sources from best to worst, each kept if the average is then strictly better.

Wortsman et al., arXiv:2203.05482, recipe 1; one pass. Members keep the order of the recipe, so that
the order in which they were added does not change their average.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.evolve.jobs import EvaluationJob
from merge_cli.evolve.journal import Evaluations
from merge_cli.evolve.loop import Candidate, best_first
from merge_cli.evolve.objectives import Split, Values
from merge_cli.recipe.schema import Recipe


def soup_of(recipe: Recipe, members: Sequence[int]) -> Recipe:
    """The plain soup of some of the recipe's models, in its order."""
    return recipe.with_result("soup", models=tuple(recipe.models[i] for i in sorted(members)))


class Greedy:
    """The search for a soup's members. A candidate's genome is 1 for each member, else 0.

    Attributes:
        candidates: every soup that was tried: first each source alone, then the growing soup.
        members: of the best soup.
    """

    def __init__(
        self, recipe: Recipe, split: Split, base: Values | None, evaluations: Evaluations
    ) -> None:
        self._recipe, self._split, self._base = recipe, split, base
        self._evaluations = evaluations
        self.candidates: list[Candidate] = []
        self.members: list[int] = []
        self.ended = ""

    def run(self) -> None:
        """One pass over the sources."""
        count = len(self._recipe.models)
        singles = self._try([[i] for i in range(count)], 0)
        order = [c.genome.index(1.0) for c in best_first(singles)]
        if not order:
            self.ended = "no source could be evaluated"
            return
        best = best_first(singles)[0]
        self.members = [order[0]]
        for step, source in enumerate(order[1:], start=1):
            (candidate,) = self._try([[*self.members, source]], step)
            if (
                candidate.score is not None
                and best.score is not None
                and (candidate.score.order < best.score.order)
            ):
                self.members, best = [*self.members, source], candidate
        self.ended = "every source has been tried"

    def _try(self, soups: Sequence[Sequence[int]], generation: int) -> list[Candidate]:
        first = len(self.candidates)
        names = [str(spec.model) for spec in self._recipe.models]
        genomes = [[float(i in soup) for i in range(len(names))] for soup in soups]
        jobs = [
            EvaluationJob(first + i, soup_of(self._recipe, soup)) for i, soup in enumerate(soups)
        ]
        lines = [
            {
                "generation": generation,
                "genome": genome,
                "parameters": {"members": [names[i] for i in sorted(soup)]},
            }
            for genome, soup in zip(genomes, soups, strict=True)
        ]
        outcomes = self._evaluations.of("candidate", jobs, lines)
        candidates = [
            Candidate(
                first + i,
                generation,
                genomes[i],
                outcome,
                None if outcome.error else self._split.score(outcome.values, self._base),
            )
            for i, outcome in enumerate(outcomes)
        ]
        self.candidates += candidates
        return candidates
