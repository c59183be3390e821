"""The recipe that a genome means, and how it is written beside OUT; also of the best so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from merge_cli.errors import Interrupted
from merge_cli.evolve.greedy import soup_of
from merge_cli.evolve.jobs import EvaluationOutcome
from merge_cli.evolve.journal import SearchWorkspace
from merge_cli.evolve.objectives import Values
from merge_cli.evolve.plan import SearchPlan
from merge_cli.evolve.verdict import shown
from merge_cli.methods.registry import get_method
from merge_cli.recipe.dump import data_from, dump_recipe, path_from
from merge_cli.recipe.schema import Recipe


class RecipeWriter:
    """Writes static recipes of a search.

    Args:
        target: OUT, beside which they lie.
    """

    def __init__(self, decided: SearchPlan, target: Path) -> None:
        self._decided, self._target = decided, target

    def recipe_of(self, genome: Sequence[float], static: str = "") -> Recipe:
        """The static recipe that a genome means, or that of the static merge with this name."""
        if static:
            return next(m.recipe for m in self._decided.statics if m.name == static)
        if self._decided.space is not None:
            return self._decided.space.recipe(genome)
        return soup_of(self._decided.recipe, [i for i, u in enumerate(genome) if u])

    def text_of(self, recipe: Recipe, score: str, static: str = "") -> str:
        """The static recipe as YAML, with paths that lead from beside OUT."""
        plan = self._decided.plan
        commits = {name: c for source in plan.sources for name, c in source.commits.items()}
        locate = path_from(self._target.absolute(), recipe.folder, commits)
        name = self._decided.recipe.merge_method
        origin = f"{static}: {name} has no better candidate" if static else f"found by {name}"
        header = f"{origin}, score {score}; merge-cli run merges it without a search"
        return dump_recipe(
            recipe,
            locate=locate,
            defaults={},
            inputs={},
            header=header,
            data=data_from(self._target.absolute(), recipe.folder),
            kind=get_method(recipe.merge_method).gathers,
        )

    def interrupted(
        self, folder: SearchWorkspace, base: Callable[[], Values | None]
    ) -> Interrupted:
        """Write the best that the journal knows, also of the generation that is not complete.

        Args:
            base: what the base reaches on the rows that are searched on; asked where something
                has been evaluated.
        """
        where, hint = str(folder.path), "The same command continues."
        split = self._decided.objective.search
        lines = [
            line
            for line in folder.lines
            if line["kind"] in ("static", "candidate")
            and line["share"] == 1.0
            and not line["error"]
        ]
        if not lines:
            return Interrupted("stopped", where=where, hint=hint)
        base_values = base()
        scored = [
            (
                split.score(EvaluationOutcome.from_json(line["number"], line).values, base_values),
                line["number"],
            )
            for line in lines
        ]
        score, number = min(scored, key=lambda item: (*item[0].order, item[1]))
        line = next(line for line in lines if line["number"] == number)
        static = line.get("merge", "")
        recipe = self.recipe_of(line["genome"], static)
        maximised = split.is_maximised(EvaluationOutcome.from_json(number, line).values)
        reached = shown({"maximised": maximised}, score.total, ".6g")
        path = folder.write_best(self.text_of(recipe, reached, static))
        tried = sum(line["kind"] not in ("start", "asked") for line in folder.lines)
        message = f"stopped after {tried} evaluations; the best so far, with score "
        return Interrupted(f"{message}{reached}, is there", where=str(path), hint=hint)
