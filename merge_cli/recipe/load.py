"""From a file to a Recipe: read, parse, report."""

from __future__ import annotations

import sys
from pathlib import Path

from merge_cli.errors import Problem, RecipeError, UsageError
from merge_cli.guarded import Unreadable, read_text
from merge_cli.guarded_yaml import MAX_YAML
from merge_cli.recipe.documents import parse_documents
from merge_cli.recipe.nodes import load_nodes
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
        return parse_text(_standard_input(), "<stdin>", Path.cwd())
    file = Path(path)
    try:
        text = read_text(file, limit=4 * MAX_YAML, pipe=True)
    except Unreadable as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError("no such recipe", where=str(file)) from None
        raise UsageError(f"the recipe {error}", where=str(file)) from None
    return parse_text(text, str(file), file.absolute().parent)


def _standard_input() -> str:
    try:
        return sys.stdin.read(MAX_YAML + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe cannot be read: {error}", where="<stdin>") from None


def parse_text(text: str, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """Parse a recipe from text; `file` is how messages call it."""
    documents = [node for node in load_nodes(text, file) if node.value is not None]
    if not documents:
        raise RecipeError([Problem("the recipe is empty", file=file, line=1, column=1)])
    return parse_documents(documents, file, folder)
