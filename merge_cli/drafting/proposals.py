"""What a first recipe proposes: by headers alone, by data, or for a method that the user chooses.

Where weights are read, `analysis.advice` proposes. Each parameter starts with a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from merge_cli.analysis.advice import EXPERIMENTS, SLERP, whole_models
from merge_cli.analysis.result import Advice, Suggestion
from merge_cli.drafting.data import METHODS, with_data
from merge_cli.drafting.inspection import ModelInspection
from merge_cli.errors import UsageError
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.recipe.automatic import Budget
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar

# Parameters that start at 1 / number of sources instead of their default, and why.
_STARTS = {
    ("task_arithmetic", "lambda"): "with equal weights the plain average of the changes",
    ("dare", "weight"): "so that the changes are averaged, not added up",
    ("dare_ties", "weight"): "so that the changes are averaged, not added up",
}
_FIXED: dict[tuple[str, str], tuple[float, str]] = {
    ("ties", "density"): (0.2, "the paper keeps the largest fifth of every change"),
    ("dare", "density"): (0.5, "half of every change is dropped, the rest doubled"),
    ("dare_ties", "density"): (0.5, "half of every change is dropped, the rest doubled"),
}
_MINUTES = 10  # of `auto`, to begin with


def from_headers(inspection: ModelInspection) -> Advice:
    """What to begin with where no weights were read."""
    model_set = inspection.model_set
    indexes = list(range(len(model_set.models)))
    if model_set.base is None:
        without_base = "Without the base that the models came from there are no task vectors."
        suggestions = [
            Suggestion("soup", f"{without_base} Give it with --base.", "arXiv:2203.05482")
        ]
        if len(indexes) == 2:
            suggestions.append(SLERP)
        return Advice(
            "Begin with the plain average.",
            tuple(suggestions),
            whole_models(inspection.recipe, "soup", indexes, {}, {}),
            ("soup: the plain average; every weight is 1.", *_vocabulary(inspection)),
        )
    if len(indexes) == 1:
        scale, summary = 0.5, "There is one source, and its change can be scaled."
        comment = "lambda 0.5: half way between the base and the model; try 0.3 to 1."
    else:
        scale, summary = round(1 / len(indexes), 4), "Begin with the average of the changes."
        comment = f"lambda {scale:g}: 1/{len(indexes)}, {_STARTS['task_arithmetic', 'lambda']}."
    reason = "The method that has helped most reliably on language models."
    source = f"arXiv:2212.04089, arXiv:2511.21437; {EXPERIMENTS}"
    others = [Suggestion("ties", "Changes that pull both ways are elected.", "arXiv:2306.01708")]
    return Advice(
        summary,
        (Suggestion("task_arithmetic", reason, source), *others * (len(indexes) > 1)),
        whole_models(inspection.recipe, "task_arithmetic", indexes, {"lambda": scale}, {}),
        (comment, *_vocabulary(inspection)),
    )


def from_data(
    inspection: ModelInspection, files: Sequence[str], kept: Collection[ModelRef] | None = None
) -> Advice:
    """Let the data choose, where every model has some.

    Args:
        files: one for each model.
        kept: those that are worth merging; None takes all.
    """
    models = inspection.recipe.models
    indexes = [i for i, spec in enumerate(models) if kept is None or spec.model in kept]
    files = [files[i] for i in indexes]
    recipe = whole_models(inspection.recipe, "auto", indexes, {}, {})
    models = tuple(replace(spec, parameters={}) for spec in recipe.models)
    recipe = replace(recipe, models=models, budget=Budget(minutes=_MINUTES))
    reason = "Every model has data: they choose the method and its numbers."
    return Advice(
        "Let the data choose the method.",
        (Suggestion("auto", reason, "docs/auto.md"),),
        with_data(recipe, files),
        (
            "It tries averages first, then merges that look at examples, then learned "
            "coefficients, and merges the best on rows that it holds out.",
            f"budget: it stops after {_MINUTES} minutes; without it, when every method is tried.",
        ),
    )


def by_method(inspection: ModelInspection, name: str, files: Sequence[str] = ()) -> Advice:
    """A recipe by the method that the user has chosen: every model, every parameter.

    Args:
        files: data, one file for each model; empty where there are none.

    Raises:
        UsageError: no such method, one that needs data that are not there, or other models than
            these.
    """
    method = draftable(name)
    if not method.plain:
        if not files:
            hint = "Give --data FILE once for each --model, in order."
            raise UsageError(f"{name} needs data of every model", hint=hint)
        if name == "auto":
            return from_data(inspection, files)
    recipe = _arranged(inspection, method)
    count = len(recipe.models)
    per_model: dict[str, Parameter] = {}
    shared: dict[str, Parameter] = {}
    comments = []
    for key, parameter in method.parameters.items():
        value, why = _start(method.name, key, count, parameter.default)
        if value is None:
            continue  # it follows from another parameter
        group = per_model if parameter.per_model else shared
        group[key] = Parameter(key, value, f"parameters.{key}")
        comments.append(f"{key} {_yaml(value)}: {why or parameter.doc}")
    models = tuple(replace(spec, parameters=per_model) for spec in recipe.models)
    recipe = replace(recipe, models=models)
    if not method.plain:
        recipe = with_data(recipe, files)
    paper = method.paper or "merge-cli methods " + method.name
    return Advice(
        method.summary,
        (Suggestion(name, method.summary, paper),),
        replace(recipe, merge_method=name, parameters=shared),
        (*comments, *_vocabulary(inspection)),
    )


def draftable(name: str) -> Method:
    """The method of that name, if models and their data are all that its recipe needs.

    Raises:
        UsageError: no such method, or one that needs an objective or a choice of its own.
    """
    method = get_method(name)
    if not method.plain and name not in METHODS:
        hint = f"Start from its example: merge-cli methods {name}"
        raise UsageError(f"{name} needs more than models and their data", hint=hint)
    return method


def _arranged(inspection: ModelInspection, method: Method) -> Recipe:
    """The recipe with the base and the sources that the method needs."""
    recipe, name = inspection.recipe, method.name
    models = recipe.models
    if method.base_is_source:
        first = SourceSpec(recipe.base_model, "base_model") if recipe.base_model else models[0]
        models = (first, *(spec for spec in models if spec.model != first.model))
        recipe = replace(recipe, base_model=first.model, models=models)
    elif method.needs_base and recipe.base_model is None:
        hint = "Give the model that the others were made from: --base."
        raise UsageError(f"{name} needs a base model", hint=hint)
    least, most = method.count
    if len(models) < least or (most is not None and len(models) > most):
        many = f"{least}" if least == most else f"{least} or more"
        plural = "s" * (many != "1")
        counted, hint = "", "merge-cli methods lists the others."
        if method.base_is_source and recipe.base_model is not None and len(models) - 1 == most:
            counted, hint = ", the base included", "Leave --base out."
        message = f"{name} merges {many} model{plural}; here are {len(models)}{counted}"
        raise UsageError(message, hint=hint)
    return recipe


def _start(method: str, key: str, count: int, default: Scalar | None) -> tuple[Scalar | None, str]:
    """A parameter's first value, and why; an empty reason means that it is the default."""
    if (method, key) in _STARTS:
        return round(1 / count, 4), f"1/{count}, {_STARTS[method, key]}"
    return _FIXED.get((method, key), (default, ""))


def _vocabulary(inspection: ModelInspection) -> tuple[str, ...]:
    """Why rows are aligned by token, where they are."""
    if not inspection.vocabularies_differ:
        return ()
    return (
        "tokenizer source union: the vocabularies differ, so rows are brought together by token. "
        "`base` keeps the base's tokens alone.",
    )


def _yaml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
