"""Writing a first recipe (`merge-cli init`): inspect the models, propose a method, plan the text.

Where weights are read, `analysis.advice` proposes. Here are the rules for headers alone, and for a
method that the user has chosen; each parameter starts with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.analysis.advice import EXPERIMENTS, SLERP, advice_text, whole_models
from merge_cli.analysis.result import Advice, Suggestion
from merge_cli.analysis.run import analyze
from merge_cli.drafting.data import METHODS, data_of, why_not, with_data
from merge_cli.drafting.inspection import ModelInspection, inspect_model
from merge_cli.errors import MismatchError, Problem, UsageError
from merge_cli.methods.registry import Method, get_method
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.automatic import Budget
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar
from merge_cli.system.raw_io import write_error

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
SCHEMA = "merge-cli.schema.json"
_MINUTES = 10  # of `auto`, to begin with
READ_AT_MOST = 4_000_000_000  # bytes of weights: seconds


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


def from_data(inspection: ModelInspection, files: Sequence[str]) -> Advice:
    """Let the data choose, where every model has some.

    Args:
        files: one for each model.
    """
    indexes = list(range(len(inspection.model_set.models)))
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
        raise UsageError(
            f"{name} merges {many} model{plural}; here are {len(models)}",
            hint="merge-cli methods lists the others.",
        )
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


@dataclass(frozen=True)
class ModelStudy:
    """Inspected models, and advice about them.

    Attributes:
        advice: what to begin with, unless the user chooses a method.
        files: data of the models, one file each; empty where not every model has some.
        header: what was looked at: the first lines of the recipe.
        notes: what the user should know, one line each.
    """

    inspection: ModelInspection
    advice: Advice
    files: tuple[str, ...]
    header: tuple[str, ...]
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
    data: Sequence[Path] = (),
    read: bool = True,
    options: MergeOptions | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ModelStudy:
    """Inspect models, and analyse their weights where those are local and small.

    Args:
        base, models: folders or Hub ids.
        data: a file for each model; empty looks for them (`drafting.data.data_of`).
        read: False never reads weights.

    Raises:
        SourceError, MismatchError, UsageError: see `inspect_model`.
    """
    files = data_of(models, data)
    inspection = inspect_model(base, models)
    notes = inspection.notes()
    if (
        read
        and not inspection.vocabularies_differ
        and inspection.is_cached_locally
        and inspection.size <= READ_AT_MOST
    ):
        analysis = analyze(base=base, models=models, options=options, on_progress=on_progress)
        notes += [verdict.text for verdict in analysis.verdicts]
        advice, weights_read = analysis.advice, "Their weights were read"
    else:
        advice, weights_read = from_headers(inspection), "Their weights were not read"
        notes.append("weights were not read; merge-cli analyze says more of these models")
    header = (
        "A first recipe by merge-cli init.",
        f"Made from {inspection.summary}.",
        f"{weights_read}.",
    )
    if advice.recipe is not None:
        if files:
            automatic = from_data(inspection, files)
            assert automatic.recipe is not None, "it always has one"
            refused = why_not(automatic.recipe, options or MergeOptions())
            notes.append(f"data: {', '.join(files)}")
            if refused:
                notes.append(f"auto is not proposed: {refused}")
            else:
                others = (*automatic.suggestions, *advice.suggestions)
                advice = replace(automatic, suggestions=others)
        assert advice.recipe is not None, "it was there before"
        advice = replace(advice, recipe=inspection.with_dtype_and_tokenizer(advice.recipe))
    return ModelStudy(inspection, advice, files, header, tuple(notes))


def scaffold(
    study: ModelStudy, path: Path, method: str | None = None, *, schema: bool = False
) -> Scaffold:
    """The text of a recipe for `path`, planned from headers as `merge-cli plan` does.

    Args:
        method: None takes the proposed one.
        schema: name the schema that `write_scaffold` puts beside the recipe, for editors.

    Raises:
        MismatchError: these models should not be merged, and no method was given.
        UsageError: a method that cannot merge these models.
        RecipeError: files of a model that no recipe can be planned with.
    """
    advice = study.advice if method is None else by_method(study.inspection, method, study.files)
    if advice.recipe is None:
        problems = [Problem(note) for note in study.notes]
        raise MismatchError(problems, f"no recipe was written: {advice.summary}")
    commits = {name: c for source in study.inspection.sources for name, c in source.commits.items()}
    folder = path.absolute().parent
    text = advice_text(advice, advice.recipe, study.header, folder, commits)
    if schema:
        text = f"# yaml-language-server: $schema={SCHEMA}\n{text}"
    make_plan(load_recipe(path.absolute(), text=text))
    return Scaffold(advice.recipe.merge_method, text)


def check_path(path: Path, overwrite: bool) -> None:
    """Refuse a path that the recipe cannot be written to, before any work.

    Raises:
        UsageError: the file exists, or its folder does not.
    """
    if path.is_dir():
        raise UsageError("is a folder; --output names a file", where=str(path))
    if path.exists() and not overwrite:
        raise UsageError("exists", where=str(path), hint="--overwrite replaces it.")
    if not path.absolute().parent.is_dir():
        raise UsageError("no such folder", where=str(path.parent))


def write_scaffold(
    scaffold: Scaffold, path: Path, overwrite: bool, schema: Mapping[str, Any] | None = None
) -> None:
    """Write the recipe.

    Args:
        schema: of recipes; written beside it, in place of an older version's.

    Raises:
        UsageError: meanwhile the file exists.
        ResourceError: it cannot be written.
    """
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(scaffold.text)
        if schema is not None:
            text = json.dumps(schema, indent=2) + "\n"
            path.with_name(SCHEMA).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise UsageError("exists", where=str(path), hint="--overwrite replaces it.") from None
    except OSError as error:
        raise write_error(error, path) from error
