"""Where an optimizer begins: its first genome, and what static merges have taught it already."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge_cli.evolve.journal import SearchWorkspace
from merge_cli.evolve.loop import Candidate, best_first
from merge_cli.evolve.optimizer import EvaluatedGenome
from merge_cli.evolve.plan import SearchPlan
from merge_cli.evolve.ranking import Ranking
from merge_cli.evolve.references import References
from merge_cli.evolve.starts import is_journal, is_recipe, start_genome
from merge_cli.evolve.static import soup_start


def first_genome(
    decided: SearchPlan,
    folder: SearchWorkspace,
    statics: Sequence[Candidate],
    references: References,
) -> list[float]:
    """The first genome; what it was is in the journal, so that a resumed run starts alike.

    Args:
        statics: the merges that need no search, evaluated.
    """
    start = next((line for line in folder.lines if line["kind"] == "start"), None)
    if start is not None:
        return list(start["genome"])
    search, space = decided.search, decided.space
    assert space is not None, "only a search of a space has genomes"
    genome = [0.5] * len(space)
    if search.start == "best" or is_journal(search.start):
        ranked = best_first([item for item in statics if item.genome])
        genome = ranked[0].genome if ranked else soup_start(space)
    elif search.start == "softmax":
        split = decided.objective.search
        base = references.base(split)
        singles = [references.of(i) for i in range(len(decided.labels))]
        measured = [references.values(source, split) for source in singles]
        totals = [split.score(values, base).total for values in measured]
        low = min(totals)
        weights = [math.exp((low - total) / search.temperature) for total in totals]
        genome = space.weighted([w / math.fsum(weights) for w in weights])
    elif is_recipe(search.start):
        genome = start_genome(decided.recipe, search, space)
    folder.append(
        {"kind": "start", "number": 0, "share": 1.0, "genome": genome, "from": search.start}
    )
    return genome


def evaluated_genomes(statics: Sequence[Candidate], goals: int) -> list[EvaluatedGenome]:
    """What the optimizer learns of static merges: of those that the space expresses."""
    ranking = Ranking(goals)
    scored = [(item.genome, item.score) for item in statics if item.genome and item.score]
    for _, score in scored:
        ranking.see(score)
    return [EvaluatedGenome(genome, *ranking.of(score)) for genome, score in scored]
