"""What a search begins with: merges without a search, an earlier search's best, a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge_cli.errors import MergeCliError
from merge_cli.evolve.earlier import SUFFIX, earlier_merges
from merge_cli.evolve.objectives import SearchObjective
from merge_cli.evolve.space import Space
from merge_cli.evolve.static import StaticMerge, static_merges
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.search import STARTS, Search


def first_merges(
    recipe: Recipe,
    search: Search,
    space: Space | None,
    objective: SearchObjective,
    fisher: StaticMerge | None,
) -> tuple[StaticMerge, ...]:
    """What is evaluated before anything is proposed."""
    merges = [*_mergeable(static_merges(recipe, space)), *([fisher] if fisher else [])]
    if space is not None and is_journal(search.start):
        path = _start_file(recipe, search)
        genomes = [merge.genome for merge in merges]
        earlier = earlier_merges(path, space, objective.search, search.finalists)
        merges += [merge for merge in earlier if merge.genome not in genomes]
    return tuple(merges)


def _mergeable(statics: Sequence[StaticMerge]) -> tuple[StaticMerge, ...]:
    """Without merges that the engine refuses for these sources."""
    is_possible: dict[str, bool] = {}
    for merge in statics:
        method = merge.recipe.merge_method
        if method not in is_possible:
            try:
                make_plan(merge.recipe)
                is_possible[method] = True
            except MergeCliError:
                is_possible[method] = False
    return tuple(merge for merge in statics if is_possible[merge.recipe.merge_method])


def start_genome(recipe: Recipe, search: Search, space: Space) -> list[float]:
    """The genome of the recipe that `start` names.

    Raises:
        RecipeError: that recipe is wrong.
        UsageError: it has other models.
    """
    return space.start_from(load_recipe(_start_file(recipe, search)))


def is_journal(start: str) -> bool:
    """Whether `start` names the journal of an earlier search."""
    return start not in STARTS and start.endswith(SUFFIX)


def is_recipe(start: str) -> bool:
    """Whether `start` names a recipe."""
    return start not in STARTS and not is_journal(start)


def _start_file(recipe: Recipe, search: Search) -> Path:
    path = local_file(search.start, recipe.folder)
    assert path is not None, "`search_problems` refuses a file that is not there"
    return path
