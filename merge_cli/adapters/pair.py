"""A fine-tune and its base side by side, tensor by tensor, as a merge would see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from merge_cli.engine.plan import Plan
from merge_cli.engine.planner import make_plan
from merge_cli.errors import MismatchError, Problem, UsageError
from merge_cli.recipe.reference import local_folder, parse_reference
from merge_cli.recipe.schema import Recipe, SourceSpec


def plan_pair(model: str, base: str) -> Plan:
    """The base's tensors and the fine-tune's, from headers.

    Raises:
        UsageError: the two are one.
        SourceError: one that cannot be opened.
        MismatchError: they do not fit one another.
    """
    here = Path.cwd()
    listed = (SourceSpec(parse_reference(model, here), "models[0]"),)
    places = [local_folder(name, here) for name in (model, base)]
    if model == base or (places[0] and places[1] and places[0].samefile(places[1])):
        raise UsageError("model and base are the same", where=model)
    recipe = Recipe("task_arithmetic", parse_reference(base, here), listed, folder=here)
    try:
        return make_plan(recipe)
    except MismatchError as error:
        what = "the fine-tune does not fit the base"
        raise MismatchError(list(_without_recipe(error.problems)), what) from error


def _without_recipe(problems: Sequence[Problem]) -> Iterator[Problem]:
    """Keys of recipes are no help here: there is none that they could be written in."""
    for problem in problems:
        resized = "tokenizer_source" in problem.hint
        yield replace(problem, hint=_RESIZED) if resized else problem


_RESIZED = (
    "Factors are of one shape: give both one vocabulary first, by a passthrough of the fine-tune "
    "with `base_model` and `tokenizer_source: base`, and extract from its result."
)
