"""From a file to a Recipe: read, parse, report.

Several documents in one file: stages, of which later ones merge the results of earlier ones.

A document with a `name` is a model that others may name under `model:` and `base_model:`, wherever
they stand. The one without a name is the result; where all have one, the last that no other uses.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from merge_cli.errors import Problem, RecipeError, UsageError
from merge_cli.recipe.nodes import Node, load_nodes
from merge_cli.recipe.parse import parse_recipe
from merge_cli.recipe.reader import Reader
from merge_cli.recipe.reference import ModelRef, local_folder, stage_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.sweep import SWEEP, has_sweep, variants_of
from merge_cli.system.paths import require_text
from merge_cli.system.untrusted import Unreadable, read_text
from merge_cli.system.untrusted_yaml import MAX_YAML


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
    require_text(file)
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


# A name becomes a folder, beside which work is kept in files of these endings.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
_FILES = ("lock", "merge-cli", "journal.jsonl")
_TAKEN = (".partial", ".training", ".search", ".stages", ".lock", ".begun", ".done", ".new")


def parse_documents(
    roots: Sequence[Node], file: str, folder: Path
) -> tuple[Recipe | None, list[Problem]]:
    """Read every document.

    Returns:
        the result's recipe, with the others as its `stages`, in an order in which each can be made
        (None if a document has no shape at all, or if there is no such order), and every problem.
    """
    if len(roots) == 1:
        return (
            _sweep(roots[0], file, folder)
            if has_sweep(roots[0])
            else parse_recipe(roots[0], file, folder)
        )
    recipes: list[Recipe] = []
    problems: list[Problem] = []
    for root in roots:
        recipe, wrong = parse_recipe(root, file, folder)
        problems += wrong
        if recipe is not None:
            recipes.append(recipe)
    for root in filter(has_sweep, roots):
        message = "is for recipes of one document."
        line, column = root.key_positions[SWEEP]
        problems.append(
            Problem(message, SWEEP, file, line, column, "Move it to a file of its own.")
        )
    problems += _names(roots, recipes, file)
    if len(recipes) < len(roots) or len({recipe.name for recipe in recipes}) < len(recipes):
        return None, problems
    by_name = {recipe.name or "": recipe for recipe in recipes}
    for recipe in recipes:
        problems += _references(recipe, by_name)
    uses = {name: _used(recipe, by_name) for name, recipe in by_name.items()}
    try:
        order = list(_file_order(uses))
    except CycleError as error:
        circle = error.args[1][:0:-1]  # graphlib lists the used before the user, one of them twice
        first = circle.index(next(name for name in by_name if name in circle))
        circle = [*circle[first:], *circle[: first + 1]]
        message = "these documents wait for one another: " + " -> ".join(circle)
        return None, [*problems, by_name[circle[0]].problem("name", message)]
    requested = set().union(*uses.values())
    final = "" if "" in by_name else [name for name in by_name if name not in requested][-1]
    stages = tuple(by_name[name] for name in order if name != final)
    for recipe in recipes:
        if recipe.output is not None:
            message = "adapters are merged by a recipe of their own."
            problems.append(recipe.problem("output", message, "Move it to a file of its own."))
    for stage in stages:
        if stage.eval is not None:
            message = "only the result is evaluated, and this is a stage."
            problems.append(stage.problem("eval", message, "Move it to the result's document."))
        if "engine" in stage.positions:
            message = "all documents of a file are merged in one place, and this is a stage."
            problems.append(stage.problem("engine", message, "Move it to the result's document."))
        if stage.quantises and stage.name in requested:
            message = "what another document merges is kept in full."
            hint = f"Only the result may be {stage.out_dtype}."
            problems.append(stage.problem("out_dtype", message, hint))
    return replace(by_name[final], stages=stages), problems


def _sweep(root: Node, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """A document with variants: the first of them, with all of them as its `sweep`."""
    reader = Reader(file, folder)
    recipes: dict[str, Recipe] = {}
    problems = reader.problems
    for name, document in variants_of(root, reader).items():
        recipe, wrong = parse_recipe(document, file, folder)
        problems += [problem for problem in wrong if problem not in problems]
        if recipe is not None:
            recipes[name] = recipe
    if not recipes:
        return None, problems
    first = next(iter(recipes.values()))
    positions = {**first.positions, **reader.positions}
    return replace(first, sweep=recipes, positions=positions), problems


def _file_order(uses: Mapping[str, set[str]]) -> Sequence[str]:
    """What is used before what uses it, and otherwise as in the file.

    Raises:
        CycleError: there is no such order.
    """
    sorter = TopologicalSorter({name: sorted(used) for name, used in uses.items()})
    sorter.prepare()
    position = {name: i for i, name in enumerate(uses)}
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=position.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def _used(recipe: Recipe, by_name: Mapping[str, Recipe]) -> set[str]:
    """The documents whose results a recipe merges."""
    return {model.path for model in recipe.references if model.path and model.path in by_name}


def _names(roots: Sequence[Node], recipes: Sequence[Recipe], file: str) -> list[Problem]:
    """What is wrong with the documents' names."""
    problems = []
    seen: dict[str, int] = {}
    unnamed = [root for root in roots if isinstance(root.value, dict) and "name" not in root.value]
    for root in unnamed[1:]:
        message = f"a second document without a name (the first is on line {unnamed[0].line})."
        hint = "Only the result may go without: give the others a `name:`."
        problems.append(Problem(message, "name", file, root.line, root.column, hint))
    for recipe in recipes:
        if recipe.name is None:
            continue
        folder = stage_folder(recipe.name)
        if not _NAME.fullmatch(recipe.name) or folder.endswith(_TAKEN) or folder in _FILES:
            message = f"'{recipe.name}' cannot name a stage, since it becomes a folder."
            hint = "Use letters, digits, '.', '_' and '-'."
            problems.append(recipe.problem("name", message, hint))
        elif folder in seen:
            message = f"'{recipe.name}' is the name of another document, on line {seen[folder]}"
            problems.append(recipe.problem("name", message))
        seen.setdefault(folder, recipe.positions.get("name", (0, 0))[0])
    return problems


def _references(recipe: Recipe, by_name: Mapping[str, Recipe]) -> list[Problem]:
    """Models that may mean a document and cannot, or nearly do."""
    problems = []
    named = [(spec.key, spec.model) for spec in recipe.source_specs]
    if recipe.base_model is not None:
        named.insert(0, ("base_model", recipe.base_model))
    for at, model in named:
        key = f"{at}.model" if f"{at}.model" in recipe.positions else at
        if model.path in by_name:
            problems += [recipe.problem(key, *wrong) for wrong in _misused(model, recipe)]
        elif near := _meant(model, by_name, recipe.folder):
            message = f"'{model}' is neither a document of this file nor a folder."
            problems.append(recipe.problem(key, message, f"Did you mean '{near}'?"))
    return problems


def _misused(model: ModelRef, recipe: Recipe) -> list[tuple[str, str]]:
    """What is asked of a document's result that it cannot give: what, hint."""
    result = []
    if local_folder(model.path, recipe.folder) is not None:
        message = f"'{model.path}' is a document of this file and a folder, too."
        result.append((message, f"Rename the document, or write ./{model.path} for the folder."))
    if model.revision:
        result.append((f"'{model.path}' is a document of this file: it has no revisions.", ""))
    if model.lora:
        message = (
            f"no adapter can be put on '{model.path}', a document of this file, in this version."
        )
        result.append((message, ""))
    return result


def _meant(model: ModelRef, by_name: Mapping[str, Recipe], folder: Path) -> str:
    """The document that a name nearly is; empty where it may well be a model on the Hub."""
    if "/" in model.path or local_folder(model.path, folder) is not None:
        return ""
    near = difflib.get_close_matches(model.path, [n for n in by_name if n], n=1, cutoff=0.75)
    return near[0] if near else ""
