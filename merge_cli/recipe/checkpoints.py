"""The `checkpoints:` of a training run: found on disk, and read into the models of a soup.

    merge_method: checkpoint_average
    checkpoints: {from: runs/pretrain, pattern: "step_{step}", steps: "10000..50000/2000"}
    schedule: minus_sqrt

is a short form: when it is read, it becomes `merge_method: soup` with a model and a weight for each
checkpoint. That is what is planned, merged, and written into the resolved recipe. Instead of a
window of a folder, `checkpoints` may list models, the oldest first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from merge_cli.recipe.forms import ListOf, Plain, Text, any_of
from merge_cli.recipe.models import MODEL
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.reference import ModelRef, local_folder
from merge_cli.recipe.schedule import Schedule
from merge_cli.recipe.schema import SourceSpec
from merge_cli.recipe.sections import Key, Section
from merge_cli.recipe.values import Parameter

METHOD, BECOMES = "checkpoint_average", "soup"
TRAINER = "checkpoint-{step}"  # as transformers' Trainer names its checkpoints
_STEP = "{step}"
_RANGE = re.compile(r"\s*(\d{1,18})\s*\.\.\s*(\d{1,18})\s*(?:/\s*(\d{1,18})\s*)?", re.ASCII)
_LISTED = 12  # steps in a message


@dataclass(frozen=True)
class StepRange:
    """Steps from `first` to `last`, both included: all that are there, or every `stride`-th."""

    first: int
    last: int
    stride: int | None = None


@dataclass(frozen=True)
class Window:
    """Which checkpoints of a run.

    Attributes:
        run: the folder of the run, as written.
        pattern: a checkpoint's path in it, with {step} for the number.
        steps: which of them; None for all.
        last: only so many of the newest; None for all.
    """

    run: str
    pattern: str = TRAINER
    steps: StepRange | tuple[int, ...] | None = None
    last: int | None = None


@dataclass(frozen=True)
class StepsForm(Form):
    """`first..last`, `first..last/stride`, or a list of steps."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        value = node.plain()
        if isinstance(value, list) and value and all(type(step) is int for step in value):
            if value[0] < 0 or any(b <= a for a, b in pairwise(value)):
                return reader.refuse_type(node, key, "must be ascending, from 0 on")
            return tuple(value)
        match = _RANGE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            allowed = 'must be "FIRST..LAST", "FIRST..LAST/STRIDE" or a list of steps'
            return reader.refuse_type(node, key, allowed)
        first, last = int(match[1]), int(match[2])
        stride = int(match[3]) if match[3] else None
        if first > last:
            return reader.refuse_type(node, key, "is an empty range: it ends before it begins")
        if stride == 0:
            return reader.refuse_type(node, key, "must have a stride of at least 1")
        if stride is not None and (last - first) % stride:
            message = f"does not reach {last}: {last - (last - first) % stride} is its last step"
            return reader.refuse_type(node, key, message)
        return StepRange(first, last, stride)

    def schema(self) -> Schema:
        listed = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
        return any_of({"type": "string", "pattern": rf"^{_RANGE.pattern}$"}, listed)


@dataclass(frozen=True)
class PatternForm(Form):
    """A relative path with {step} in it, once."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        pattern = Text(line=True).read(node, key, reader)
        if pattern is REFUSED:
            return REFUSED
        if pattern.count(_STEP) != 1:
            hint = f"Write a checkpoint's name with {_STEP} for its number, as in {TRAINER}."
            return reader.refuse_type(node, key, f"must contain {_STEP} once", hint)
        if set(pattern.replace(_STEP, "")) & set("{}*?[]\\"):
            message = f"may have no wildcard and no braces besides {_STEP}"
            return reader.refuse_type(node, key, message)
        path = PurePosixPath(pattern)
        if path.is_absolute() or ".." in path.parts:
            return reader.refuse_type(node, key, "must be a path inside the run's folder")
        return path.as_posix()

    def schema(self) -> Schema:
        return {"type": "string", "pattern": r"\{step\}"}


def _window(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    if "steps" in node.value and "last" in node.value:
        return reader.refuse(node.value["last"], f"{key}.last", "give either steps or last")
    if len(values) < len(node.value) or "from" not in values:
        return REFUSED  # a part of it has been refused
    run = values.pop("from")
    return Window(run, **values)


WINDOW = Section(
    {
        "from": Key(Text(), "the folder of the run", required=True),
        "pattern": Key(
            PatternForm(), "a checkpoint's path in the run's folder; {step} is a number", TRAINER
        ),
        "steps": Key(
            StepsForm(), '"FIRST..LAST" for all that are there, "FIRST..LAST/STRIDE", or a list'
        ),
        "last": Key(Plain(int, 1), "only so many, the newest"),
    },
    _window,
    rules={"not": {"required": ["steps", "last"]}},
)


_LIST = ListOf(MODEL)


@dataclass(frozen=True)
class CheckpointsForm(Form):
    """A window of a run's folder, or a list of models, the oldest first."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, list):
            return WINDOW.read(node, key, reader)
        models = _LIST.read(node, key, reader)
        # What was refused in a list is left out, and weights are of all of them.
        return models if models is not REFUSED and len(models) == len(node.value) else REFUSED

    def schema(self) -> Schema:
        return any_of(WINDOW.schema(), _LIST.schema())


CHECKPOINTS = CheckpointsForm()


def expand(values: dict[str, Any], root: Node, reader: Reader) -> None:
    """Put a soup's models and weights in the place of a window, in the values of a recipe.

    What is wrong with it is in `reader.problems`; the method is then left as it is.
    """
    checkpoints = values.pop("checkpoints", None)
    schedule = values.pop("schedule", None)
    given = root.value
    if values.get("merge_method") != METHOD:
        for key in ("checkpoints", "schedule"):
            if key in given:
                hint = f"Write `merge_method: {METHOD}`."
                reader.refuse(given[key], key, f"belongs to {METHOD}.", hint)
        return
    if "checkpoints" not in given:
        hint = "Write `checkpoints: {from: FOLDER, last: 8}`; models with weights are a `soup`."
        reader.refuse(given["merge_method"], "merge_method", f"{METHOD} needs `checkpoints`.", hint)
        return
    weight = values.get("parameters", {}).get("weight")
    if weight is not None:
        hint = "Write `schedule: {weights: [...]}` for weights of your own."
        reader.refuse_key(weight.key, "the schedule gives the weights.", hint)
    if isinstance(checkpoints, Window):
        chosen = _chosen(checkpoints, given["checkpoints"], reader)
        names = [*map(str, chosen)]
        models = [ModelRef(f"{checkpoints.run.rstrip('/')}/{path}") for path in chosen.values()]
    else:
        chosen, models = {}, [*(checkpoints or ())]
        names = [*map(str, models)]
    if not models or ("schedule" in given and schedule is None):
        return
    schedule = schedule or Schedule()
    try:
        weights = schedule.weights(len(models))
    except ValueError as error:
        hint = f"They are: {_in_words(names)}."
        reader.refuse(given["schedule"], "schedule.weights", str(error), hint)
        return
    values["models"] = _sources(models, weights, reader)
    values["merge_method"] = BECOMES
    values["notes"] = _notes(names, schedule, weights, [*chosen])


def _sources(
    models: Sequence[ModelRef], weights: Sequence[float], reader: Reader
) -> tuple[SourceSpec, ...]:
    """A model for each checkpoint, which messages find where it is listed, or at the section."""
    sources = []
    for i, (model, weight) in enumerate(zip(models, weights, strict=True)):
        key = f"checkpoints[{i}]"
        reader.positions.setdefault(key, reader.positions["checkpoints"])
        sources.append(SourceSpec(model, key, {"weight": Parameter("weight", weight, key)}))
    return tuple(sources)


def _chosen(window: Window, node: Node, reader: Reader) -> dict[int, str]:
    """The window's checkpoints, step -> path in the run's folder, ascending; empty if refused."""
    run = local_folder(window.run, reader.folder)
    if run is None or not run.is_dir():
        reader.refuse(node.value["from"], "checkpoints.from", f"no such folder: '{window.run}'")
        return {}
    present, twice = _present(run, window.pattern)
    at = node.value.get("pattern", node)
    if twice:
        message = f"{twice[0]} and {twice[1]} are the same step"
        reader.refuse(at, "checkpoints.pattern", message, "Rename one of them.")
        return {}
    if not present:
        message = f"nothing in '{window.run}' is called {window.pattern}"
        reader.refuse(at, "checkpoints.pattern", message)
        return {}
    steps = sorted(present)
    if window.last is not None:
        if window.last > len(steps):
            message = f"there are only {len(steps)} checkpoints (asked for {window.last})"
            where = node.value["last"]
            reader.refuse(where, "checkpoints.last", message, f"There: {_in_words(steps)}.")
            return {}
        steps = steps[-window.last :]
    elif window.steps is not None:
        requested = _wanted(window.steps, steps)
        missing = [step for step in requested if step not in present]
        if missing or not requested:
            message = f"not there: {_in_words(missing)}" if missing else "none is there"
            where = node.value["steps"]
            reader.refuse(where, "checkpoints.steps", message, f"There: {_in_words(steps)}.")
            return {}
        steps = requested
    return {step: present[step] for step in steps}


def _wanted(steps: StepRange | tuple[int, ...], present: Sequence[int]) -> list[int]:
    if isinstance(steps, tuple):
        return [*steps]
    if steps.stride is None:
        return [step for step in present if steps.first <= step <= steps.last]
    return [*range(steps.first, steps.last + 1, steps.stride)]


def _present(run: Path, pattern: str) -> tuple[dict[int, str], list[str]]:
    """Step -> path of every checkpoint in a run's folder, and two paths of one step, if there are.

    Only the folder whose names have the step is listed; what the pattern has behind it (`hf` in
    `step_{step}/hf`) must be there, or a checkpoint that is still being converted would count.
    """
    parts = PurePosixPath(pattern).parts
    index = next(i for i, part in enumerate(parts) if _STEP in part)
    before, after = parts[index].split(_STEP)
    name = re.compile(rf"{re.escape(before)}(\d{{1,18}}){re.escape(after)}", re.ASCII)
    folder = run.joinpath(*parts[:index])
    present: dict[int, str] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = name.fullmatch(entry.name)
        path = PurePosixPath(*parts[:index], entry.name, *parts[index + 1 :]).as_posix()
        if match is None or not (run / path).is_dir():
            continue
        step = int(match[1])
        if step in present:
            return {}, [present[step], path]
        present[step] = path
    return present, []


def _in_words(names: Sequence[object]) -> str:
    if len(names) <= _LISTED:
        return ", ".join(map(str, names))
    half = _LISTED // 2
    shown = [*map(str, names[:half]), "...", *map(str, names[-half:])]
    return f"{', '.join(shown)} ({len(names)} in all)"


def _notes(
    names: Sequence[str], schedule: Schedule, weights: Sequence[float], steps: Sequence[int]
) -> tuple[str, ...]:
    """What the plan says of the window; `steps` is empty where checkpoints are listed."""
    total = math.fsum(weights) or 1.0  # the plan refuses weights that have no sum
    shares = ", ".join(
        f"{name} {100 * weight / total:.3g} %" for name, weight in zip(names, weights, strict=True)
    )
    plural = "s" * (len(names) != 1)
    notes = [f"{len(names)} checkpoint{plural}, schedule {schedule}: {shares}"]
    gaps = {after - now for now, after in pairwise(steps)}
    if len(gaps) > 1 and schedule.decays:
        notes.append(
            f"the steps are {min(gaps)} to {max(gaps)} apart; the schedule counts checkpoints, "
            "not steps"
        )
    return tuple(notes)
