"""Writing a first recipe (`merge-cli init`): inspect models, propose a method, plan the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.analysis.advised_recipe import advice_text
from merge_cli.analysis.result import Advice
from merge_cli.analysis.run import analyze
from merge_cli.drafting.data import data_by_model, data_of, why_not
from merge_cli.drafting.inspection import ModelInspection, inspect_model
from merge_cli.drafting.proposals import by_method, from_data, from_headers
from merge_cli.errors import MismatchError, Problem, UsageError
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.sources.result_files import check_writable, refuse_replacing
from merge_cli.system.raw_io import write_error

SCHEMA = "merge-cli.schema.json"
READ_AT_MOST = 4_000_000_000  # bytes of weights: seconds


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
    results: Mapping[str, Path] | None = None,
    options: MergeOptions | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ModelStudy:
    """Inspect models, and analyse their weights where those are local and small.

    Args:
        base, models: folders or Hub ids.
        data: a file for each model; empty looks for them (`drafting.data.data_of`).
        read: False never reads weights.
        results: option -> the file that will be written; none may be one that is read.

    Raises:
        SourceError, MismatchError, UsageError: see `inspect_model` and `refuse_replacing`.
    """
    given = data_of(models, data) if data else ()  # checked before anything is opened
    inspection = inspect_model(base, models)
    distinct = [str(spec.model) for spec in inspection.recipe.models]
    files = data_by_model(inspection.recipe, models, given) if data else data_of(distinct, ())
    _refuse_replacing(results or {}, inspection, files)
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
            kept = [spec.model for spec in advice.recipe.models]
            automatic = from_data(inspection, files, kept)
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


def result_files(path: Path, *, schema: bool) -> dict[str, Path]:
    """What `write_scaffold` writes for a recipe in `path`, by the option that says so."""
    return {"--output": path} | ({f"{SCHEMA} beside it": path.with_name(SCHEMA)} if schema else {})


def refuse_read(study: ModelStudy, results: Mapping[str, Path]) -> None:
    """Refuse to write over what was studied.

    Raises:
        UsageError: names the file.
    """
    _refuse_replacing(results, study.inspection, study.files)


def _refuse_replacing(
    results: Mapping[str, Path], inspection: ModelInspection, files: Sequence[str]
) -> None:
    # What exists is refused without --overwrite already.
    refuse_replacing(results, inspection.sources, map(Path, files), overwrite=True)


def check_path(path: Path, overwrite: bool) -> None:
    """Refuse a path that the recipe cannot be written to, before any work.

    Raises:
        UsageError: the file exists, or its folder does not.
    """
    check_writable({"--output": path})
    if path.exists() and not overwrite:
        raise UsageError("exists", where=str(path), hint="--overwrite replaces it.")


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
