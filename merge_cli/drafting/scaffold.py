"""A method and where its parameters start, with the reason for each.

Where weights are read, `analysis.advice` decides. Here are the rules for headers alone, and for a
method that the user has chosen.

A first recipe: models looked at, a method proposed, and the text planned before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_cli.analysis.advice import advice_text, whole_models
from merge_cli.analysis.result import Advice, Suggestion
from merge_cli.analysis.run import analyze
from merge_cli.drafting.inspection import ModelInspection, inspect_model
from merge_cli.engine.options import MergeOptions, Progress
from merge_cli.errors import MismatchError, Problem, UsageError
from merge_cli.methods.registry import Method, get_method
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar
from merge_cli.system.raw_io import write_error

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


READ_AT_MOST = 4_000_000_000  # bytes of weights: seconds


@dataclass(frozen=True)
class ModelStudy:
    """Models, and what is to be said of them.

    Attributes:
        advice: what to begin with, where the user does not say.
        about: what was looked at: the first lines of the recipe.
        notes: what the user should know, one line each.
    """

    look: ModelInspection
    advice: Advice
    about: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Scaffold:
    """A recipe that has been planned without a problem."""

    method: str
    text: str


def study_models(
    base: str | None,
    models: Sequence[str],
    *,
    read: bool = True,
    options: MergeOptions | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> ModelStudy:
    """Look at models, and at their weights where they are here and small.

    Args:
        base, models: folders or Hub ids.
        read: False never reads weights.

    Raises:
        SourceError, MismatchError, UsageError: see `look_at`.
    """
    look = inspect_model(base, models)
    notes = look.notes()
    if read and not look.unlike and look.is_here and look.size <= READ_AT_MOST:
        analysis = analyze(base=base, models=models, options=options, show=show)
        notes += [verdict.text for verdict in analysis.verdicts]
        advice, whence = analysis.advice, "their weights were read"
    else:
        advice, whence = from_headers(look), "their weights were not read"
        notes.append("weights were not read; merge-cli analyze says more of these models")
    about = ("A first recipe by merge-cli init.", f"It looked at {look.summary}; {whence}.")
    if advice.recipe is not None:
        advice = replace(advice, recipe=look.dressed(advice.recipe))
    return ModelStudy(look, advice, about, tuple(notes))


def scaffold(found: ModelStudy, path: Path, method: str | None = None) -> Scaffold:
    """The text of a recipe that will lie at `path`, planned from headers as `merge-cli plan` does.

    Args:
        method: None takes what was proposed.

    Raises:
        MismatchError: these models should not be merged, and no method was asked for.
        UsageError: a method that these models cannot be merged by.
        RecipeError: a model's own files that no recipe can be planned with.
    """
    advice = found.advice if method is None else by_method(found.look, method)
    if advice.recipe is None:
        problems = [Problem(note) for note in found.notes]
        raise MismatchError(problems, f"no recipe was written: {advice.summary}")
    commits = {name: c for source in found.look.sources for name, c in source.commits.items()}
    folder = path.absolute().parent
    text = advice_text(advice, advice.recipe, found.about, folder, commits)
    make_plan(load_recipe(path.absolute(), text=text))
    return Scaffold(advice.recipe.merge_method, text)


def check_path(path: Path, overwrite: bool) -> None:
    """Refuse a place where the recipe may not go, before anything is looked at.

    Raises:
        UsageError: the file exists, or its folder does not.
    """
    if path.is_dir():
        raise UsageError("is a folder; --output names a file", where=str(path))
    if path.exists() and not overwrite:
        raise UsageError("exists", where=str(path), hint="--overwrite replaces it.")
    if not path.absolute().parent.is_dir():
        raise UsageError("no such folder", where=str(path.parent))


def write_scaffold(drafted: Scaffold, path: Path, overwrite: bool) -> None:
    """Write the recipe.

    Raises:
        UsageError: meanwhile the file exists.
        ResourceError: it cannot be written.
    """
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(drafted.text)
    except FileExistsError:
        raise UsageError("exists", where=str(path), hint="--overwrite replaces it.") from None
    except OSError as error:
        raise write_error(error, path) from error
