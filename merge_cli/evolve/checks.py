"""A recipe that searches against the methods that it searches: every range checked at its place."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.errors import Problem, UsageError
from merge_cli.evolve.defaults import DEFAULT_RANGES
from merge_cli.methods.method import Method
from merge_cli.methods.parameters import MethodParameter
from merge_cli.methods.registry import get_method, method_names
from merge_cli.planning.preparation import preparation_for
from merge_cli.recipe.fields import MERGEKIT_PARAMETERS, nearest
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.search import STARTS, WITHOUT_SPACE, Search, SearchedParameter
from merge_cli.recipe.statistics import unused_options

GREEDY = "greedy_soup"


def search_problems(recipe: Recipe, *, searching: bool) -> Iterator[Problem]:
    """What the sections on searching lack, or want from a method that does not search."""
    if not searching:
        message = f"{recipe.merge_method} searches nothing."
        hint = "Use `merge_method: evolutionary` (or greedy_soup)."
        if recipe.search is not None:
            yield recipe.problem("search", message, hint)
        if recipe.objective is not None:
            yield recipe.problem("objective", message, hint)
        return
    if recipe.objective is None:
        hint = "Write `objective: [{task: loss, data: FILE}]`."
        yield recipe.problem("merge_method", "needs an `objective:` to judge by.", hint)
    if recipe.quantises:
        word = recipe.out_dtype
        message = f"candidates are judged in the dtype that they are merged in: not in {word}."
        yield recipe.problem(
            "out_dtype", message, f"Search in bfloat16, then merge the result in {word}."
        )
    for key in ("slices", "modules"):
        if getattr(recipe, key):
            message = f"{recipe.merge_method} merges whole models."
            yield recipe.problem(key, message, "List them under `models:`.")
    yield from _data_problems(recipe)
    search = recipe.search
    if recipe.merge_method == GREEDY:
        for name in sorted((search.given if search else frozenset()) - WITHOUT_SPACE):
            yield recipe.problem(f"search.{name}", "has no meaning in greedy_soup.")
        if recipe.tokenizer_source not in (None, "base"):
            message = "of a greedy soup not every average contains that model."
            hint = "Name a `base_model`, whose tokenizer it is."
            yield recipe.problem("tokenizer_source", message, hint)
        for parameters in (recipe.parameters, *(spec.parameters for spec in recipe.models)):
            for given in parameters.values():
                yield recipe.problem(given.key, "greedy_soup chooses, and averages, by itself.")
        return
    if search is None:
        hint = "Name a `method` and the ranges of its `parameters`."
        yield recipe.problem("merge_method", "needs a `search:` section.", hint)
        return
    yield from _section_problems(recipe, search)


def _data_problems(recipe: Recipe) -> Iterator[Problem]:
    """`data:` of the models: of all of them, or none. It is for Fisher merging alone."""
    given = [spec for spec in recipe.models if spec.data is not None]
    if not given:
        if recipe.statistics is not None:
            message = "has no effect: no model has `data:`."
            hint = "Give every model data, to compare with Fisher merging, or leave it out."
            yield recipe.problem("statistics", message, hint)
        return
    for spec in recipe.models:
        if spec.data is None:
            message = "has no `data:`, and other models have: Fisher merging needs that of all."
            yield recipe.problem(spec.key, message, "Give all models data, or none.")
        elif spec.data.held_out:
            message = f"has no effect in {recipe.merge_method}, which has an objective."
            yield recipe.problem(f"{spec.key}.data.held_out", message, "Leave it out.")
    for option in unused_options("fisher"):
        if f"statistics.{option}" in recipe.positions:
            message = "has no effect in Fisher merging."
            yield recipe.problem(f"statistics.{option}", message, "Leave it out.")


def _section_problems(recipe: Recipe, search: Search) -> Iterator[Problem]:
    for name in ("method", "parameters"):
        if name == "parameters" and (search.layers or set(search.method) <= set(DEFAULT_RANGES)):
            continue  # its methods have default ranges
        if name not in search.given:
            yield recipe.problem("search", f"`{name}` is missing.")
    methods: list[Method] = []
    for name in search.method:
        try:
            method = get_method(name)
        except UsageError as error:
            yield recipe.problem("search.method", error.message, error.hint)
            continue
        preparation = preparation_for(method)
        if preparation is not None:
            message = (
                f"'{name}' {preparation.does}: a search is of methods that need no such thing."
            )
            plain = {n for n in method_names() if get_method(n).plain}
            hint = nearest(name, plain)
            yield recipe.problem("search.method", message, hint)
            continue
        if method.is_short_form:
            message = f"'{name}' has no parameters to search."
            yield recipe.problem("search.method", message, "Use soup over the checkpoints.")
            continue
        methods.append(method)
    if search.layers is not None:
        yield from _layer_problems(recipe, search)
    if search.start not in STARTS and local_file(search.start, recipe.folder) is None:
        hint = "Use best, middle, softmax, or the file of a recipe or of a search's journal."
        yield recipe.problem("search.start", f"no such file: {search.start}.", hint)
    for only, requested in (("sigma", "cma-es"), ("restarts", "cma-es")):
        if only in search.given and search.optimizer != requested:
            message = f"has no effect with {search.optimizer}."
            yield recipe.problem(f"search.{only}", message, f"Leave it out, or use {requested}.")
    if "temperature" in search.given and search.start != "softmax":
        yield recipe.problem("search.temperature", "has no effect without `start: softmax`.")
    if "keep" in search.given and not search.fidelity:
        yield recipe.problem("search.keep", "has no effect without `fidelity`.")
    if search.asynchronous and search.fidelity:
        message = "generations are thinned out, and an asynchronous search has none."
        yield recipe.problem("search.fidelity", message, "Leave one of them out.")
    if "smooth" in search.given and search.layer_groups == 1:
        yield recipe.problem("search.smooth", "has no effect with one group of layers.")
    if not methods or len(methods) < len(search.method):
        return
    for searched in search.parameters:
        yield from _range_problems(recipe, searched, methods)
    for method in methods[1:]:
        for parameters in (recipe.parameters, *(spec.parameters for spec in recipe.models)):
            for given in parameters.values():
                if given.name not in (*method.parameters, *MERGEKIT_PARAMETERS):
                    yield recipe.problem(given.key, f"{method.name} has no such parameter.")


def _layer_problems(recipe: Recipe, search: Search) -> Iterator[Problem]:
    """`layers:` beside what is for parameters."""
    if search.method and search.method != ("passthrough",):
        message = "with `layers`, layers are stacked as they are."
        yield recipe.problem("search.method", message, "Use `method: passthrough`.")
    for name in ("parameters", "layer_groups", "smooth", "filters"):
        if name in search.given:
            message = "has no meaning beside `layers`, which searches no parameters."
            yield recipe.problem(f"search.{name}", message, "Leave it out.")
    if search.start == "softmax":
        message = "softmax is of weights, and layers have none."
        yield recipe.problem("search.start", message, "Use best or middle.")
    for parameters in (recipe.parameters, *(spec.parameters for spec in recipe.models)):
        for given in parameters.values():
            message = "has no effect: layers are stacked as they are."
            yield recipe.problem(given.key, message, "Leave it out.")


def _range_problems(
    recipe: Recipe, searched: SearchedParameter, methods: list[Method]
) -> Iterator[Problem]:
    owners = [m.parameters[searched.name] for m in methods if searched.name in m.parameters]
    if not owners:
        names = sorted({name for method in methods for name in method.parameters})
        text = f"{' and '.join(m.name for m in methods)} has no such parameter."
        yield recipe.problem(searched.key, text, nearest(searched.name, names))
        return
    if "models" in searched.tied and not any(owner.per_model for owner in owners):
        text = f"{searched.name} is one value for all models already."
        yield recipe.problem(f"{searched.key}.tied", text)
    for owner in owners:
        numeric = owner.kind in (int, float) and not owner.choices
        if not searched.choices and not numeric:
            text = f"{searched.name} is {owner.allowed}, not a range of numbers."
            yield recipe.problem(searched.key, text, "Give `choices`.")
            return
        for message in sorted(_refused(searched, owner)):
            yield recipe.problem(searched.key, f"{message}.")


def _refused(searched: SearchedParameter, owner: MethodParameter) -> set[str]:
    values = searched.choices or (searched.low, searched.high)
    return {message for value in values if (message := owner.check(value))}
