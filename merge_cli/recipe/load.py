"""From a file to a Recipe: read, parse, report."""

from __future__ import annotations

import sys
from pathlib import Path

from merge_cli.errors import Problem, RecipeError, UsageError
from merge_cli.recipe.nodes import load_nodes
from merge_cli.recipe.parse import parse_recipe
from merge_cli.recipe.schema import Recipe


def read_recipe(path: str | Path) -> tuple[Recipe | None, list[Problem]]:
    """Read a recipe file (`-` is standard input, its folder the working directory).

    Returns:
        The recipe as far as it could be read, and the problems with its shape.

    Raises:
        UsageError: the file cannot be read.
        RecipeError: the file is not YAML at all.
    """
    if str(path) == "-":
        return parse_text(sys.stdin.read(), "<stdin>", Path.cwd())
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError("no such recipe", where=str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe cannot be read: {error}", where=str(file)) from None
    return parse_text(text, str(file), file.absolute().parent)


def parse_text(text: str, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """Parse one recipe from text; `file` is how messages call it."""
    documents = load_nodes(text, file)
    if not documents:
        raise RecipeError([Problem("the recipe is empty", file=file, line=1, column=1)])
    if len(documents) > 1:
        what = "several documents in one file are not supported by this version."
        place = documents[1]
        hint = "Run the stages one after the other, each from its own file."
        raise RecipeError([Problem(what, "", file, place.line, place.column, hint)])
    return parse_recipe(documents[0], file, folder)
