"""A first recipe: models looked at, a method proposed, and the text planned before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_cli.analysis.recipe_file import advice_text
from merge_cli.analysis.result import Advice
from merge_cli.analysis.run import analyze
from merge_cli.checkpoint.raw import write_error
from merge_cli.drafting.look import ModelInspection, inspect_model
from merge_cli.drafting.propose import by_method, from_headers
from merge_cli.engine.options import MergeOptions, Progress
from merge_cli.engine.planner import load_recipe, make_plan
from merge_cli.errors import MismatchError, Problem, UsageError

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
