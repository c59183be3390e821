"""A method and where its parameters start, with the reason for each.

Where weights are read, `analysis.advice` decides. Here are the rules for headers alone, and for a
method that the user has chosen.
"""

from __future__ import annotations

from dataclasses import replace

from merge_cli.analysis.advice import whole_models
from merge_cli.analysis.result import Advice, Suggestion
from merge_cli.drafting.look import ModelInspection
from merge_cli.errors import UsageError
from merge_cli.methods.registry import Method, get_method
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar

_OURS = "docs/experiments.md"
# Where to start, where a method's default is not the place. A function of the number of sources.
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


def from_headers(look: ModelInspection) -> Advice:
    """What to begin with where nothing is known of the weights."""
    subject = look.subject
    kept = list(range(len(subject.models)))
    if subject.base is None:
        why = "Without the base that the models came from there are no task vectors."
        suggestions = [Suggestion("soup", f"{why} Give it with --base.", "arXiv:2203.05482")]
        if len(kept) == 2:
            circle = "With two models, the great circle keeps the norm that an average shrinks."
            suggestions.append(Suggestion("slerp", circle, _OURS))
        return Advice(
            "Begin with the plain average.",
            tuple(suggestions),
            whole_models(look.recipe, "soup", kept, {}, {}),
            ("soup: the plain average; every weight is 1.", *_vocabulary(look)),
        )
    if len(kept) == 1:
        scale, summary = 0.5, "There is one source, and its change can be scaled."
        comment = "lambda 0.5: half way between the base and the model; try 0.3 to 1."
    else:
        scale, summary = round(1 / len(kept), 4), "Begin with the average of the changes."
        comment = f"lambda {scale:g}: 1/{len(kept)}, {_STARTS['task_arithmetic', 'lambda']}."
    reason = "The method that has helped most reliably on language models."
    source = f"arXiv:2212.04089, arXiv:2511.21437; {_OURS}"
    others = [Suggestion("ties", "Changes that pull both ways are elected.", "arXiv:2306.01708")]
    return Advice(
        summary,
        (Suggestion("task_arithmetic", reason, source), *others * (len(kept) > 1)),
        whole_models(look.recipe, "task_arithmetic", kept, {"lambda": scale}, {}),
        (comment, *_vocabulary(look)),
    )


def by_method(look: ModelInspection, name: str) -> Advice:
    """A recipe by the method that the user has chosen: every model, every parameter.

    Raises:
        UsageError: no such method, one that needs data, or other models than these.
    """
    method = draftable(name)
    recipe = _arranged(look, method)
    count = len(recipe.models)
    own: dict[str, Parameter] = {}
    shared: dict[str, Parameter] = {}
    comments = []
    for key, parameter in method.parameters.items():
        value, why = _start(method.name, key, count, parameter.default)
        if value is None:
            continue  # it follows from another parameter
        place = own if parameter.per_model else shared
        place[key] = Parameter(key, value, f"parameters.{key}")
        comments.append(f"{key} {_yaml(value)}: {why or parameter.doc}")
    models = tuple(replace(spec, parameters=own) for spec in recipe.models)
    paper = method.paper or "merge-cli methods " + method.name
    return Advice(
        method.summary,
        (Suggestion(name, method.summary, paper),),
        replace(recipe, merge_method=name, models=models, parameters=shared),
        (*comments, *_vocabulary(look)),
    )


def draftable(name: str) -> Method:
    """The method of that name, if models are all that its recipe needs.

    Raises:
        UsageError: no such method, or one that needs data.
    """
    method = get_method(name)
    if not method.plain:
        hint = f"Start from its example: merge-cli methods {name}"
        raise UsageError(f"{name} needs data to learn, search or measure with", hint=hint)
    return method


def _arranged(look: ModelInspection, method: Method) -> Recipe:
    """The models in the places where the method wants them."""
    recipe, name = look.recipe, method.name
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
        raise UsageError(
            f"{name} merges {many} model{plural}; here are {len(models)}",
            hint="merge-cli methods lists the others.",
        )
    return recipe


def _start(method: str, key: str, count: int, default: Scalar | None) -> tuple[Scalar | None, str]:
    """Where a parameter starts, and why; an empty reason means that it is the default."""
    if (method, key) in _STARTS:
        return round(1 / count, 4), f"1/{count}, {_STARTS[method, key]}"
    return _FIXED.get((method, key), (default, ""))


def _vocabulary(look: ModelInspection) -> tuple[str, ...]:
    """Why rows are brought together by token, where they are."""
    if not look.unlike:
        return ()
    return (
        "tokenizer source union: the vocabularies differ, so rows are brought together by token. "
        "`base` keeps the base's tokens alone.",
    )


def _yaml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
