"""Evaluation files: every key is honoured or refused, with its line, and all problems at once.

A task's keys are the fields of its class (`tasks/`), checked by their types.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from merge_cli.errors import Problem, RecipeError, UsageError
from merge_cli.evaluation.spec import DTYPES, EvalSpec, default_name
from merge_cli.evaluation.task import Task
from merge_cli.evaluation.tasks import KINDS
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node, load_nodes
from merge_cli.recipe.reference import expanded
from merge_cli.system.untrusted import Unreadable, is_file, read_text
from merge_cli.system.untrusted_yaml import MAX_YAML

# Fields that name something: a model, a task, a function.
_NAMES = ("name", "expert", "teacher", "lm_eval", "python")
_TOP = ("tasks", "seed", "max_length", "batch_tokens", "dtype", "limit")


def read_eval(path: Path) -> EvalSpec:
    """An evaluation file (docs/evaluate.md); paths in it are relative to it.

    Raises:
        UsageError: it cannot be read.
        RecipeError: every problem, with file, line and column.
    """
    try:
        text = read_text(path, limit=4 * MAX_YAML, pipe=True)
    except Unreadable as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError("no such evaluation file", where=str(path)) from None
        raise UsageError(str(error), where=str(path)) from None
    nodes = load_nodes(text, str(path))
    if len(nodes) != 1:
        message = f"an evaluation file is one document (got {len(nodes)})"
        raise RecipeError([Problem(message, file=str(path))])
    return parse_eval(nodes[0], str(path), path.absolute().parent)


def parse_eval(root: Node, file: str, folder: Path) -> EvalSpec:
    """The same from a node: a mapping with `tasks`, or the list of tasks alone.

    Raises:
        RecipeError: as above.
    """
    parser = _EvalParser(file, folder)
    spec = parser.spec(root)
    if parser.problems:
        raise RecipeError(parser.problems)
    return spec


class _EvalParser:
    def __init__(self, file: str, folder: Path) -> None:
        self.file, self.folder = file, folder
        self.problems: list[Problem] = []

    def spec(self, root: Node) -> EvalSpec:
        top: Mapping[str, Node] = {"tasks": root}
        if isinstance(root.value, dict):
            top = self._known(root, "", _TOP)
        if "tasks" not in top:
            self._add(root, "tasks", "missing.", "List at least one task.")
            return EvalSpec(())
        listed = top["tasks"].value
        if not isinstance(listed, list) or not listed:
            self._add(top["tasks"], "tasks", "must be a list of at least one task")
            return EvalSpec(())
        limit = self._number(top.get("limit"), "limit", 1)
        found = [self._task(node, f"tasks[{i}]", limit) for i, node in enumerate(listed)]
        tasks = [task for task in found if task is not None]
        self._refuse_equal_names(tasks, listed)
        dtype = top["dtype"].plain() if "dtype" in top else "auto"
        if dtype not in ("auto", *DTYPES):
            self._add(top["dtype"], "dtype", f"must be auto, {', '.join(DTYPES)} (got {dtype!r})")
        return EvalSpec(
            tuple(tasks),
            seed=self._number(top.get("seed"), "seed", 0) or 0,
            max_length=self._number(top.get("max_length"), "max_length", 2),
            batch_tokens=self._number(top.get("batch_tokens"), "batch_tokens", 1) or 8192,
            dtype=str(dtype),
            file=self.file,
        )

    def _task(self, node: Node, key: str, limit: int | None) -> Task | None:
        if not isinstance(node.value, dict):
            self._add(
                node,
                key,
                f"must be a mapping such as {{task: loss, data: FILE}} (got {node.plain()!r})",
            )
            return None
        named = node.value.get("task")
        short = next((kind for kind in ("lm_eval", "python") if kind in node.value), None)
        word = named.value if named else short
        if word is None:
            self._add(node, f"{key}.task", "missing.", f"Known: {', '.join(KINDS)}.")
            return None
        if not isinstance(word, str) or word not in KINDS:
            word = named.plain() if named else word
            self._add(
                named or node, f"{key}.task", f"unknown task {word!r}.", nearest(str(word), KINDS)
            )
            return None
        kind = KINDS[word]
        hints = get_type_hints(kind)
        requested = {f.name: f for f in fields(kind) if f.name != "folder"}
        given = self._known(node, key, ("task", *requested))
        values: dict[str, Any] = {} if limit is None else {"limit": limit}
        for name, child in given.items():
            if name == "task":
                continue
            value, wrong = self._value(child, hints[name])
            if not wrong and name in _NAMES and (not value.strip() or not value.isprintable()):
                wrong = "must be a line of text"
            least = requested[name].metadata.get("least")
            if not wrong and least is not None and value is not None and value < least:
                wrong = f"must be at least {least}"
            if wrong:
                self._add(child, f"{key}.{name}", f"{wrong} (got {child.plain()!r})")
            else:
                values[name] = value
        missing = [
            name for name, f in requested.items() if f.default is MISSING and name not in given
        ]
        for name in missing:
            self._add(node, f"{key}.{name}", f"missing: {requested[name].metadata['help']}")
        for name in ("data", "fewshot"):
            if values.get(name) is not None and not is_file(values[name]):
                self._add(given[name], f"{key}.{name}", f"no such file: {values[name]}")
        data = values.get("data")
        if missing or self.problems:
            return None
        if "folder" in hints:
            values["folder"] = self.folder
        values.setdefault("name", default_name(data) if data else values.get("lm_eval", word))
        try:
            return kind(**values)
        except ValueError as error:  # what a task itself has against its values
            about, _, message = str(error).partition(" ")
            if about in given:
                self._add(given[about], f"{key}.{about}", message)
            else:
                self._add(node, key, str(error))
            return None

    def _value(self, node: Node, hint: Any) -> tuple[Any, str]:
        """A field's value, or what is wrong with it."""
        value = node.plain()
        if get_origin(hint) in (Union, types.UnionType):
            if value is None:
                return None, ""
            (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
        if hint is Path:
            return (
                (self.folder / expanded(value), "")
                if isinstance(value, str)
                else (None, "must be a path")
            )
        if get_origin(hint) is tuple:
            texts = [value] if isinstance(value, str) else value
            fits = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            if fits and "" in texts:  # every text ends at its beginning
                return None, "must not be empty"
            return (tuple(texts), "") if fits else (None, "must be a text or a list of texts")
        if get_origin(hint) is Literal:
            allowed = get_args(hint)
            return (value, "") if value in allowed else (None, f"must be {' or '.join(allowed)}")
        accepts, words = _PLAIN[hint]
        return (value, "") if accepts(value) else (None, f"must be {words}")

    def _number(self, node: Node | None, key: str, least: int) -> int | None:
        if node is None or node.value is None:
            return None
        if type(node.value) is int and node.value >= least:
            return node.value
        self._add(node, key, f"must be a whole number of at least {least} (got {node.plain()!r})")
        return None

    def _refuse_equal_names(self, tasks: list[Task], nodes: list[Node]) -> None:
        seen: set[str] = set()
        for task, node in zip(tasks, nodes, strict=False):
            if task.name in seen:
                message = f"a second task called '{task.name}'."
                self._add(node, "tasks", message, "Give it a `name` of its own.")
            seen.add(task.name)

    def _known(self, node: Node, key: str, known: tuple[str, ...]) -> dict[str, Node]:
        """The known children of a mapping, but for those without a value, which count as absent."""
        result = {}
        for name, child in node.value.items():
            if name in known:
                if child.value is not None:
                    result[name] = child
                continue
            line, column = node.key_places[name]
            path = f"{key}.{name}" if key else name
            hint = nearest(name, known)
            self.problems.append(Problem("unknown key.", path, self.file, line, column, hint))
        return result

    def _add(self, node: Node, key: str, what: str, hint: str = "") -> None:
        self.problems.append(Problem(what, key, self.file, node.line, node.column, hint))


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (lambda value: isinstance(value, str), "text"),
    int: (lambda value: type(value) is int, "a whole number"),
    float: (lambda value: isinstance(value, float | int) and type(value) is not bool, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}
