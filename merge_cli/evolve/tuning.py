"""`--tune`: search parameters of a plain recipe on data.

merge-cli run recipe.yaml out --tune lambda=0:1 --tune-on val.jsonl
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merge_cli.errors import RecipeError, UsageError
from merge_cli.methods.registry import get_method
from merge_cli.planning.method_checks import check_recipe
from merge_cli.planning.preparation import preparation_for
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.search import TIES, Search, SearchedParameter

EVALUATIONS = 12


def tuned(
    recipe: Recipe, ranges: Sequence[str], data: Sequence[Path], evaluations: int = EVALUATIONS
) -> Recipe:
    """The recipe as a search for these parameters, each one number for the whole merge.

    Args:
        ranges: `name=low:high`.
        data: text, whose loss is minimised.

    Raises:
        UsageError: an invalid range, a parameter twice, no data, a recipe that learns or searches,
            or one whose result is no complete model.
        RecipeError: a parameter that the method does not have, or outside its range.
    """
    if recipe.sweep:
        hint = "Leave one of them out."
        raise UsageError("--tune and `sweep:` both vary parameters", hint=hint)
    method = get_method(recipe.merge_method)
    preparation = preparation_for(method)
    if preparation is not None:
        message = f"--tune is for plain recipes, and {method.name} {preparation.does}"
        hint = "Leave --tune out, or run it with several values: only the merge is repeated."
        raise UsageError(message, hint=hint)
    if recipe.output is not None or recipe.quantises:
        message = "--tune judges whole models, in the dtype that they are merged in"
        key = "`output: adapter`" if recipe.output else f"`out_dtype: {recipe.out_dtype}`"
        raise UsageError(message, hint=f"Tune without {key} first.")
    if not data:
        raise UsageError("--tune needs text to judge by", hint="Add --tune-on FILE.")
    if not ranges:
        raise UsageError(
            "--tune-on needs --tune: the parameters to search", hint="Add --tune lambda=0:1."
        )
    searched = tuple(_range(text, recipe) for text in ranges)
    names = {parameter.name for parameter in searched}
    if len(names) < len(searched):
        (twice, _), *_ = Counter(parameter.name for parameter in searched).most_common()
        raise UsageError(f"--tune: {twice} has two ranges", hint="Give each parameter one.")

    def without(spec: SourceSpec) -> SourceSpec:
        return replace(
            spec, parameters={k: v for k, v in spec.parameters.items() if k not in names}
        )

    search = Search(
        method=(recipe.merge_method,),
        parameters=searched,
        evaluations=evaluations,
        in_space=True,
        given=frozenset(("method", "parameters", "evaluations")),
    )
    tuned_recipe = replace(
        recipe,
        merge_method="evolutionary",
        parameters={k: v for k, v in recipe.parameters.items() if k not in names},
        models=tuple(map(without, recipe.models)),
        search=search,
        objective=Node([_task(path) for path in data], 0, 0),
    )
    problems = check_recipe(tuned_recipe).problems
    if problems:
        raise RecipeError(problems)
    return tuned_recipe


def _range(text: str, recipe: Recipe) -> SearchedParameter:
    name, _, bounds = text.partition("=")
    low, _, high = bounds.partition(":")
    try:
        searched = SearchedParameter(
            name, float(low), float(high), tied=tuple(TIES), key=f"--tune {name}"
        )
    except ValueError:
        hint = "Write it like lambda=0:1."
        raise UsageError(f"--tune: '{text}' is not a range", hint=hint) from None
    if not searched.low < searched.high:
        raise UsageError(f"--tune: in '{text}' the second number must be the larger")
    parameters = get_method(recipe.merge_method).parameters
    if name not in parameters:
        message = f"--tune: {recipe.merge_method} has no parameter '{name}'"
        raise UsageError(message, hint=nearest(name, parameters))
    per_model = parameters[name].per_model
    return (
        searched if per_model else replace(searched, tied=tuple(t for t in TIES if t != "models"))
    )


def _task(path: Path) -> Node:
    data = str(path.absolute())
    parts = {"task": Node("loss", 0, 0), "data": Node(data, 0, 0)}
    return Node(parts, 0, 0, dict.fromkeys(parts, (0, 0)))
