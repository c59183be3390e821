"""The suggested recipe as a file that `merge-cli run` accepts, with the reasons as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_cli.analysis.result import Advice, Analysis
from merge_cli.checkpoint.raw import write_error
from merge_cli.errors import MismatchError, Problem
from merge_cli.recipe.dump import dump_recipe, path_from
from merge_cli.recipe.schema import Recipe

_WIDTH = 96


def recipe_text(analysis: Analysis, folder: Path) -> str:
    """The recipe's YAML; local models are named by paths that lead from `folder`.

    Raises:
        MismatchError: these models cannot, or should not, be merged: the analysis says why.
    """
    advice = analysis.advice
    if advice.recipe is None:
        problems = [Problem(line) for line in analysis.problems]
        raise MismatchError(problems, f"no recipe was written: {advice.summary}")
    commits = {one.reference: one.revision for one in analysis.files if one.revision}
    about = ["A first recipe, suggested by merge-cli analyze from the weights alone."]
    return advice_text(advice, advice.recipe, about, folder, commits)


def advice_text(
    advice: Advice, recipe: Recipe, about: Sequence[str], folder: Path, commits: Mapping[str, str]
) -> str:
    """A recipe's YAML with the reasons for it as comments.

    Args:
        about: the first lines: who suggests it, from what.
        folder: where the file will lie.
        commits: model as the recipe names it -> the commit it was resolved to.
    """
    lines = [
        *about,
        *(f"{one.method}: {one.reason} ({one.source})" for one in advice.suggestions[:1]),
        *advice.comments,
        *(f"Also worth trying: {one.method} ({one.source})." for one in advice.suggestions[1:]),
        "Compare with the sources on held-out data before you believe it.",
    ]
    wrapped = [part for line in lines for part in textwrap.wrap(line, _WIDTH)]
    return dump_recipe(
        recipe,
        locate=path_from(folder, recipe.folder, commits),
        defaults={},
        inputs={},
        header="\n# ".join(wrapped),
    )


def write_recipe(analysis: Analysis, path: Path) -> None:
    """Write it.

    Raises:
        MismatchError: there is no recipe for these models.
        ResourceError: the file cannot be written.
    """
    text = recipe_text(analysis, path.absolute().parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error
