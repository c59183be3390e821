"""Evaluation files: every key is honoured or refused, with its line, and all problems at once.

A task's keys are the fields of its class (`tasks/`). An objective is read by the same code: it has
the same tasks with keys of its own beside theirs (`extra`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from merge_cli.errors import Problem, RecipeError, UsageError
from merge_cli.evaluation.spec import EvalSpec, default_name
from merge_cli.evaluation.task import Task
from merge_cli.evaluation.tasks import KINDS
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.forms import ListOf, Plain, any_of
from merge_cli.recipe.nodes import Node, load_nodes
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.sections import Key, Section, keys_of
from merge_cli.system.untrusted import Unreadable, read_text
from merge_cli.system.untrusted_yaml import MAX_YAML

_SHORT = ("lm_eval", "python")  # a key that says which task it is: `lm_eval: gsm8k` alone will do


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
    reader = Reader(file, folder, mergekit=False)
    values = EVALUATION.read(root, "", reader)
    if values is not REFUSED:
        refuse_equal_names(values.get("tasks", ()), "tasks", reader)
    if reader.problems:
        raise RecipeError(reader.problems)
    return spec_of(values["tasks"], values, file)


@dataclass(frozen=True)
class TaskEntry:
    """A task as it was read.

    Attributes:
        extra: the values of keys that are not the task's.
        node: where it stands, under `key`.
    """

    task: Task
    extra: Mapping[str, Any]
    node: Node
    key: str


@dataclass(frozen=True)
class TaskForm(Form):
    """One task.

    Attributes:
        extra: keys that may stand beside the task's own.
        check: looks for what does not go together in the values of these.
        definition: the schema's name.
        rules: what JSON Schema has to say of the extra keys.
    """

    extra: Mapping[str, Key] = field(default_factory=dict)
    check: Callable[[dict[str, Any], Node, str, Reader], None] = lambda values, node, key, reader: (
        None
    )
    definition: str = "task"
    rules: Schema = field(default_factory=dict)

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        before = len(reader.problems)
        kind = self._kind(node, key, reader)
        if kind is REFUSED:
            return REFUSED
        values = self.sections[kind].read(node, key, reader)
        extra = {name: values.pop(name) for name in self.extra if name in values}
        self.check(extra, node, key, reader)
        values.pop("task", None)
        if len(reader.problems) > before:
            return REFUSED
        task = _task(KINDS[kind], values, node, key, reader)
        return REFUSED if task is None else TaskEntry(task, extra, node, key)

    def _kind(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict):
            message = "must be a mapping such as {task: loss, data: FILE}"
            return reader.refuse_type(node, key, message)
        named = node.value.get("task")
        short = next((kind for kind in _SHORT if kind in node.value), None)
        kind = named.value if named else short
        if kind is None:
            hint = f"Known: {', '.join(KINDS)}."
            return reader.refuse(node, f"{key}.task", "missing.", hint)
        if not isinstance(kind, str) or kind not in KINDS:
            kind = named.plain() if named else kind
            message = f"unknown task {kind!r}."
            return reader.refuse(named or node, f"{key}.task", message, nearest(str(kind), KINDS))
        return kind

    @cached_property
    def sections(self) -> dict[str, Section]:
        """The keys of every kind of task."""
        kind_key = Key(Plain(str), "what is evaluated")
        return {
            kind: Section({"task": kind_key, **_task_keys(cls), **self.extra}, rules=self.rules)
            for kind, cls in KINDS.items()
        }

    def schema(self) -> Schema:
        return {"$ref": f"#/$defs/{self.definition}"}

    def define(self) -> dict[str, Schema]:
        """The definitions that `schema` refers to: of a task, and of each kind of it."""
        kinds = {f"{self.definition}.{name}": s.schema() for name, s in self.sections.items()}
        named: Schema = {"enum": list(KINDS), "description": "what is evaluated"}
        branches = [
            {"if": _is_kind(kind), "then": {"$ref": f"#/$defs/{self.definition}.{kind}"}}
            for kind in KINDS
        ]
        task = {
            "type": "object",
            "properties": {"task": named},
            "anyOf": [{"required": [name]} for name in ("task", *_SHORT)],
            "allOf": branches,
        }
        return {self.definition: task, **kinds}


@dataclass(frozen=True)
class EvaluationForm(Form):
    """A list of tasks, or a mapping of `tasks` and settings: values by key."""

    task: TaskForm

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict):
            tasks = self._tasks.read(node, key or "tasks", reader)
            return REFUSED if tasks is REFUSED else {"tasks": tasks}
        return self.section.read(node, key, reader)

    @property
    def _tasks(self) -> ListOf:
        return ListOf(self.task, "must be a list of at least one task")

    @property
    def section(self) -> Section:
        """The mapping's keys."""
        tasks = Key(
            self._tasks,
            "what is evaluated",
            required=True,
            hint="List at least one task.",
            missing="missing.",
        )
        return Section({"tasks": tasks, **_SETTINGS})

    def schema(self) -> Schema:
        return any_of(self.section.schema(), self._tasks.schema())


_SETTINGS = {
    "seed": Key(Plain(int, 0), "seed of row samples and few-shot examples", 0),
    "max_length": Key(Plain(int, 2), "tokens of context; default the model's own"),
    "batch_tokens": Key(Plain(int, 1), "tokens of one batch, padding included", 8192),
    "dtype": Key(
        Plain(Literal["auto", "float32", "bfloat16", "float16"]),
        "dtype that the model runs in",
        "auto",
    ),
    "limit": Key(Plain(int, 1), "a seeded sample of this many rows of each task"),
}
EVALUATION = EvaluationForm(TaskForm())


def spec_of(entries: Sequence[TaskEntry], settings: Mapping[str, Any], file: str) -> EvalSpec:
    """Tasks and settings that have been read, with `limit` where a task has none of its own."""
    limit = settings.get("limit")
    tasks = [entry.task for entry in entries]
    if limit is not None:
        tasks = [task if task.limit else replace(task, limit=limit) for task in tasks]
    given = {name: settings[name] for name in _SETTINGS if name in settings and name != "limit"}
    return EvalSpec(tuple(tasks), **given, file=file)


def refuse_equal_names(entries: Sequence[TaskEntry], key: str, reader: Reader) -> None:
    """Two tasks of one name could not be told apart in tables and gates."""
    seen: set[str] = set()
    for entry in entries:
        if entry.task.name in seen:
            message = f"a second task called '{entry.task.name}'."
            reader.refuse(entry.node, key, message, "Give it a `name` of its own.")
        seen.add(entry.task.name)


def _task_keys(kind: type[Task]) -> dict[str, Key]:
    """A task's fields, but for the folder that its paths start from, which nobody writes."""
    return {name: about for name, about in keys_of(kind).items() if name != "folder"}


def _task(
    kind: type[Task], values: dict[str, Any], node: Node, key: str, reader: Reader
) -> Task | None:
    if any(f.name == "folder" for f in fields(kind)):
        values["folder"] = reader.folder
    data = values.get("data")
    values.setdefault("name", default_name(data) if data else values.get("lm_eval", kind.kind))
    try:
        return kind(**values)
    except ValueError as error:  # what a task itself has against its values: `system is a ...`
        name, _, message = str(error).partition(" ")
        if name in node.value:
            reader.refuse(node.value[name], f"{key}.{name}", message)
        else:
            reader.refuse(node, key, str(error))
        return None


def _is_kind(kind: str) -> Schema:
    named: Schema = {"properties": {"task": {"const": kind}}, "required": ["task"]}
    if kind not in _SHORT:
        return named
    others = [{"required": [name]} for name in ("task", *_SHORT[: _SHORT.index(kind)])]
    return any_of(named, {"required": [kind], "not": {"anyOf": others}})
