"""The advised recipe as a file that `merge-cli run` accepts, with the reasons as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_cli.analysis.result import Advice, Analysis
from merge_cli.errors import MismatchError, Problem
from merge_cli.recipe.dump import data_from, dump_recipe, path_from
from merge_cli.recipe.schema import Recipe
from merge_cli.system.raw_io import write_error

_WIDTH = 96


def recipe_text(analysis: Analysis, folder: Path) -> str:
    """The recipe's YAML, with paths of local models relative to `folder`.

    Raises:
        MismatchError: these models cannot, or should not, be merged: the analysis says why.
    """
    advice = analysis.advice
    if advice.recipe is None:
        problems = [Problem(line) for line in analysis.problems]
        raise MismatchError(problems, f"no recipe was written: {advice.summary}")
    commits = {file.reference: file.revision for file in analysis.files if file.revision}
    header = ["A first recipe, suggested by merge-cli analyze from the weights alone."]
    return advice_text(advice, advice.recipe, header, folder, commits)


def advice_text(
    advice: Advice, recipe: Recipe, header: Sequence[str], folder: Path, commits: Mapping[str, str]
) -> str:
    """A recipe's YAML with the reasons for it as comments.

    Args:
        header: the first lines.
        folder: the file's.
        commits: model as the recipe names it -> its commit.
    """
    lines = [
        *header,
        *(
            f"{suggestion.method}: {suggestion.reason} ({suggestion.source})"
            for suggestion in advice.suggestions[:1]
        ),
        *advice.comments,
        *(f"Also worth trying: {s.method} ({s.source})." for s in advice.suggestions[1:]),
        "Compare with the sources on held-out data before you believe it.",
    ]
    wrapped = [part for line in lines for part in textwrap.wrap(line, _WIDTH)]
    return dump_recipe(
        recipe,
        locate=path_from(folder, recipe.folder, commits),
        defaults={},
        inputs={},
        header="\n# ".join(wrapped),
        data=data_from(folder, recipe.folder),
    )


def write_recipe(analysis: Analysis, path: Path) -> None:
    """Write the suggested recipe.

    Raises:
        MismatchError: there is no recipe for these models.
        ResourceError: the file cannot be written.
    """
    text = recipe_text(analysis, path.absolute().parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error
