"""Merge dicts of tensors in memory: what training loops and notebooks call.

The methods are the registry's, and they see what the engine shows them of files: flat, upcast
blocks, with task vectors subtracted once. So the numbers are those of a merge of the same weights
on disk, bit for bit. Everything runs in the calling thread, on the device where the tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merge_cli.checkpoint.dtypes import SAFETENSORS_NAMES
from merge_cli.engine.dict_merger import StateDictMerger
from merge_cli.engine.dict_tensors import StateDict, check_tensors
from merge_cli.errors import RecipeError, UsageError
from merge_cli.methods.blocks import Span, operand_specs
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.planning.method_checks import check_recipe
from merge_cli.planning.resolve import Resolver
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Parameters, Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar

if TYPE_CHECKING:
    import torch

_BASE = ModelRef("base")


def merge_state_dicts(
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    method: str = "soup",
    base: StateDict | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    allow_non_finite: bool = False,
    **parameters: Scalar | Sequence[Scalar],
) -> dict[str, torch.Tensor]:
    """Merge state dicts, by any method that needs nothing but weights and parameters.

    Args:
        state_dicts: name -> tensor, with the same names and shapes in each. What is not a float
            (counters, masks) is copied from the base, or else from the first.
        weights: one for each state dict; None leaves them to the method.
        method: as recipes name it (`merge-cli methods`).
        base: the model that task vectors are measured from, for methods that have them.
        dtype: of the result's floats; None keeps each tensor's own, where dicts differ the
            narrowest that holds the numbers of all.
        seed: of random masks.
        allow_non_finite: merge NaN and Inf, too.
        parameters: the method's, by the recipe's names (`lambda_` for `lambda`): one value, or a
            list with one for each state dict where the method takes one for each model.

    Returns:
        new tensors of the same shapes, each on the device of the base's tensor, or else the
        first's. Tensors that share memory in every dict (tied weights) share it in the result.

    Raises:
        UsageError: a method that needs more, a base that is missing or has no use, parameters that
            the method does not have.
        RecipeError: values that cannot be, or more or fewer state dicts than the method takes.
        MismatchError: names, shapes or kinds of tensors that differ, all at once.
        NonFiniteError: NaN or Inf among the weights, or a result too large for float16.
    """
    import torch

    recipe = _recipe(len(state_dicts), weights, method, base is not None, seed, parameters)
    formula = _method_of(recipe)
    specs = operand_specs(recipe, formula, recipe.models)
    if base is not None and not (formula.needs_base or _BASE in [spec.model for spec in specs]):
        raise UsageError(f"{method} has no use for a base", hint="Leave base out.")
    labels = [str(spec.model) for spec in recipe.models]
    given = dict(zip(labels, state_dicts, strict=True))
    given |= {str(_BASE): base} if base is not None else {}
    check_tensors(given, reference=str(_BASE) if base is not None else str(specs[0].model))
    indexes = {spec.model: index for index, spec in enumerate(recipe.models)}
    merger = StateDictMerger(
        formula,
        Resolver(recipe, formula, None, specs),
        [given[str(spec.model)] for spec in specs],
        base if formula.needs_base else None,
        Span(seed=seed, sources=tuple(indexes.get(spec.model, -1) for spec in specs)),
        SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")] if dtype is not None else None,
        allow_non_finite,
    )
    with torch.no_grad():
        return merger.merge(base if base is not None else state_dicts[0], list(given.values()))


def _recipe(
    count: int,
    weights: Sequence[float] | None,
    method: str,
    has_base: bool,
    seed: int,
    parameters: Mapping[str, Scalar | Sequence[Scalar]],
) -> Recipe:
    """The recipe that means this merge, so that it is checked as every other is.

    Raises:
        UsageError, RecipeError: as `merge_state_dicts` does.
    """
    if not count:
        raise UsageError("there are no state dicts to merge")
    values = {name.rstrip("_"): value for name, value in parameters.items()}
    if weights is not None:
        if "weight" in values:
            raise UsageError("give either weights or weight, not both")
        values["weight"] = [*weights]
    shared: dict[str, Parameter] = {}
    of_models: list[dict[str, Parameter]] = [{} for _ in range(count)]
    for name, value in values.items():
        if isinstance(value, str) or not isinstance(value, Sequence):
            shared[name] = Parameter(name, value, name)
        elif len(value) != count:
            raise UsageError(f"{name} has {len(value)} values for {count} state dicts")
        else:
            for parameters_of, item in zip(of_models, value, strict=True):
                parameters_of[name] = Parameter(name, item, name)
    models = tuple(_spec(index, settings) for index, settings in enumerate(of_models))
    base = _BASE if has_base else None
    return Recipe(method, base, models, parameters=shared, seed=seed)


def _spec(index: int, parameters: Parameters) -> SourceSpec:
    return SourceSpec(ModelRef(f"state_dicts[{index}]"), f"models[{index}]", parameters)


def _method_of(recipe: Recipe) -> Method:
    """The formula that is computed.

    Raises:
        UsageError: one that needs more than weights, or a base that is not there.
        RecipeError: what is wrong with the parameters.
    """
    name = recipe.merge_method
    method = get_method(name)
    if not method.plain:
        hint = "Merge checkpoints on disk by a recipe, or take soup with weights."
        raise UsageError(f"{name} needs more than weights and parameters", hint=hint)
    method = (method.resolve_variant and method.resolve_variant(recipe)) or method
    if method.needs_base and recipe.base_model is None:
        raise UsageError(f"{name} needs the model that the others began from", hint="Give base.")
    # In a recipe, those of mergekit's other methods are passed by; here nobody has copied them.
    per_model = [*recipe.models[0].parameters]
    for given in (*recipe.parameters, *per_model):
        parameter = method.parameters.get(given)
        if parameter is None:
            hint = f"Its parameters: {', '.join(method.parameters) or 'none'}."
            raise UsageError(f"{name} has no parameter '{given}'", hint=hint)
        if given in per_model and not parameter.per_model:
            raise UsageError(f"{given} is one value for the whole merge, not one for each model")
    problems = check_recipe(recipe).problems
    if problems:
        raise RecipeError(problems)
    return method
