"""What a method has to say about a recipe: how many models it takes, and which parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from merge_cli.errors import Problem, UsageError
from merge_cli.methods.blocks import averages_base, lists_base, operand_specs
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.planning.adapter_sections import adapter_problems
from merge_cli.planning.preparation import preparation_for, preparations
from merge_cli.recipe.fields import MERGEKIT_PARAMETERS, nearest
from merge_cli.recipe.schema import Parameters, Recipe, SliceSpec, SourceSpec
from merge_cli.recipe.values import (
    Parameter,
    Scalar,
    filters,
    is_graded,
    matches,
    scalars,
)


@dataclass(frozen=True)
class Checked:
    """A recipe's method, or None where there is none of that name, and what was found."""

    method: Method | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


def check_recipe(recipe: Recipe) -> Checked:
    """Every problem that the method has with the recipe, without looking at a model."""
    name = recipe.merge_method
    if not name:
        return Checked(None, (), ())
    try:
        method = get_method(name)
    except UsageError as error:
        hint = error.hint if error.where == "" else ""
        return Checked(None, (recipe.problem("merge_method", error.message, hint),), ())
    if method.resolve_variant is not None:
        method = method.resolve_variant(recipe) or method
    problems: list[Problem] = []
    warnings: list[str] = []
    if recipe.statistics_folder is not None and not method.gathers:
        message, hint = f"{name} merges with no gathered statistics.", "Use regmean or fisher."
        problems.append(recipe.problem("statistics", message, hint))
    for preparation in preparations():
        problems += preparation.check(recipe, method)
        warnings += preparation.warnings(recipe, method)
        unknown = preparation.finds_method and preparation.name == get_method(name).preparation
        if problems and unknown:
            return Checked(method, tuple(problems), ())
    problems += adapter_problems(recipe, method)
    groups = _groups(recipe)
    based = recipe.output is not None  # changes start from nothing
    if (
        method.needs_base
        and not based
        and any(group_recipe.base_model is None for group_recipe, *_ in groups)
    ):
        message = f"{name} adds changes to a base model, and the recipe names none."
        problems.append(recipe.problem("merge_method", message, "Add `base_model:`."))
    for group_recipe, key, output_slice, specs in groups:
        _check_count(group_recipe, method, key, specs, output_slice, problems)
        _check_lent_layers(group_recipe, method, key, specs, problems)
        if output_slice is not None and output_slice.parameters:
            _check_parameters(recipe, method, output_slice.parameters, None, problems, warnings)
        for spec in specs:
            if spec.parameters and method.needs_base and spec.model == group_recipe.base_model:
                position = recipe.position_of(f"{spec.key}.parameters")
                warnings.append(f"{position}: has no effect: the base has no task vector.")
    warnings += [*_unlisted_base(recipe, method), *_random_rescaling(recipe, method)]
    for shared in (recipe.parameters, *(module.parameters for module in recipe.modules)):
        _check_parameters(recipe, method, shared, None, problems, warnings)
    for spec in recipe.source_specs:
        _check_parameters(recipe, method, spec.parameters, spec, problems, warnings)
    return Checked(method, tuple(problems), tuple(warnings))


def _groups(recipe: Recipe) -> list[tuple[Recipe, str, SliceSpec | None, tuple[SourceSpec, ...]]]:
    if not recipe.all_slices:
        return [(recipe, "models", None, recipe.models)]
    return [
        (recipe.of_slice(output_slice), output_slice.key, output_slice, output_slice.sources)
        for output_slice in recipe.all_slices
    ]


def _unlisted_base(recipe: Recipe, method: Method) -> list[str]:
    """What becomes of a base that an average does not list."""
    if recipe.base_model is None or method.averages_base is None:
        return []
    position = recipe.position_of("base_model")
    for group_recipe, _, output_slice, specs in _groups(recipe):
        if averages_base(group_recipe, method, specs, output_slice):
            return [f"{position}: averaged with the models, as in mergekit."]
        if not lists_base(group_recipe, specs):
            return [
                f"{position}: provides config and tokenizer only. It is not averaged, because "
                "`models` does not list it."
            ]
    return []


def _random_rescaling(recipe: Recipe, method: Method) -> list[str]:
    """A line where what is dropped at random is made up for otherwise than by mergekit."""
    rescale = method.parameters.get("rescale")
    if rescale is None or rescale.default != "density" or _finds_method(recipe):
        return []
    groups = [recipe.parameters, *(module.parameters for module in recipe.modules)]
    groups += [output_slice.parameters for output_slice in recipe.all_slices]
    groups += [spec.parameters for spec in recipe.source_specs]

    def given(name: str) -> list[Scalar]:
        settings = [group[name].setting for group in groups if name in group]
        return [value for setting in settings for value in scalars(setting)]

    drops = any(isinstance(value, int | float) and value < 1 for value in given("density"))
    plain = all(rescale.read(value) in ("density", True) for value in given("rescale"))
    if not drops or not plain:
        return []
    message = (
        f"{recipe.merge_method} divides what is kept by its chance, as the paper does; mergekit"
    )
    return [f"{recipe.position_of('merge_method')}: {message} by L1 norms: `rescale: l1`."]


def _finds_method(recipe: Recipe) -> bool:
    """Whether the method that merges is another one than the recipe names, found beforehand."""
    preparation = preparation_for(get_method(recipe.merge_method))
    return preparation is not None and preparation.finds_method


def _check_count(
    recipe: Recipe,
    method: Method,
    key: str,
    specs: tuple[SourceSpec, ...],
    output_slice: SliceSpec | None,
    problems: list[Problem],
) -> None:
    least, most = method.count
    count = len(operand_specs(recipe, method, specs, output_slice))
    if not specs or least <= count and (most is None or count <= most):
        return
    requested = f"exactly {least}" if least == most else f"at least {least}"
    besides = " besides the base" if method.needs_base else ""
    counted = f"got {count}"
    if recipe.base_model is not None and not method.needs_base and count > len(specs):
        counted += ", the base included"
    takes = f"takes {requested} model{'s' * (least != 1)}{besides}"
    message = f"{recipe.merge_method} {takes} ({counted})"
    hint = ""
    if most is not None and count > most:
        hint = "`merge-cli methods` lists those that take more."
        if recipe.base_model in [spec.model for spec in specs] or "base included" in counted:
            hint = f"The base counts: list {most}, or name the base under `base_model` alone."
    problems.append(recipe.problem(key, message, hint))


def _check_lent_layers(
    recipe: Recipe,
    method: Method,
    key: str,
    specs: tuple[SourceSpec, ...],
    problems: list[Problem],
) -> None:
    """A base that a slice does not list lends the models' layers: those must be the same."""
    takes_part = method.needs_base or method.base_is_source
    listed = any(spec.model == recipe.base_model for spec in specs)
    ranges = {spec.layer_range for spec in specs if spec.layer_range}
    if recipe.base_model is None or not takes_part or listed or len(ranges) < 2:
        return
    several = ", ".join(f"[{first}, {end}]" for first, end in sorted(ranges))
    message = f"which layers of {recipe.base_model} belong to {several} is not said"
    hint = "List the base among the sources, with its layer_range."
    problems.append(recipe.problem(key, message, hint))


def _check_parameters(
    recipe: Recipe,
    method: Method,
    parameters: Parameters,
    spec: SourceSpec | None,
    problems: list[Problem],
    warnings: list[str],
) -> None:
    shown = method.name if _finds_method(recipe) else recipe.merge_method
    preparation = preparation_for(method)
    hint = preparation.parameter_hint if preparation is not None else ""
    for name, given in parameters.items():
        cached = method.parameters.get(name)
        passed_by = name in MERGEKIT_PARAMETERS and not hint
        if cached is None and passed_by:
            warnings.append(f"{recipe.position_of(given.key)}: has no effect in {shown}.")
        elif cached is not None and spec is not None and not cached.per_model and passed_by:
            text = "has no effect under a model: it is one value for the whole merge"
            warnings.append(f"{recipe.position_of(given.key)}: {text}.")
        elif cached is None:
            text = f"{shown} has no such parameter."
            near = nearest(name, method.parameters) if method.parameters else ""
            problems.append(recipe.problem(given.key, text, hint or near))
        elif spec is not None and not cached.per_model:
            text = f"{name} is one value for the whole merge, not one for each model."
            problems.append(
                recipe.problem(given.key, text, "Move it to the recipe's `parameters:`.")
            )
        else:
            values = scalars(given.setting)
            wrong = {message for v in values if (message := cached.check(v))}
            problems.extend(recipe.problem(given.key, message + ".") for message in sorted(wrong))
            if not wrong and any(map(cached.is_capped, values)):
                text = f"is read as {cached.range.high:g} where it is more"
                warnings.append(f"{recipe.position_of(given.key)}: {text}.")


def unused_filters(recipe: Recipe, names: Iterable[str]) -> Iterator[str]:
    """One line for each filter that matches none of the output's tensors.

    Args:
        names: of all the output's tensors, and those that slices have in their sources.
    """
    all_names: tuple[str, ...] | None = None  # a million names, which most recipes do not ask for
    is_used: dict[str, bool] = {}
    for parameter in _parameters(recipe):
        for filter in sorted(filters(parameter.setting)):
            if filter not in is_used:
                all_names = tuple(names) if all_names is None else all_names
                is_used[filter] = any(matches(filter, name) for name in all_names)
            if not is_used[filter]:
                line, _ = recipe.positions.get(parameter.key, (0, 0))
                where = f"{parameter.key}, line {line} of the recipe" if line else parameter.key
                yield f"{where}: the filter '{filter}' matches no tensor and has no effect"


def beyond_note(recipe: Recipe, layers: Sequence[str]) -> Iterator[str]:
    """A line on layers behind the model's last, where a gradient has to treat them somehow."""
    if layers and any(is_graded(parameter.setting) for parameter in _parameters(recipe)):
        yield (
            f"{', '.join(layers)}: behind the layers that the config counts; "
            "takes the last value of gradients"
        )


def _parameters(recipe: Recipe) -> Iterator[Parameter]:
    """Every setting, wherever it stands."""
    groups: list[Parameters] = [
        recipe.parameters,
        *(module.parameters for module in recipe.modules),
        *(output_slice.parameters for output_slice in recipe.all_slices),
        *(spec.parameters for spec in recipe.source_specs),
    ]
    return (item for group in groups for item in group.values())
