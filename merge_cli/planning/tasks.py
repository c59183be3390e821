"""The output tensors: dtype, action and parameters of each, and why one cannot be merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import TypeVar

from merge_cli.checkpoint.dtypes import MERGEABLE, SAFETENSORS_NAMES
from merge_cli.checkpoint.layout import natural_order
from merge_cli.errors import Problem, RecipeError
from merge_cli.formats.encoding import Verbatim
from merge_cli.methods.method import Method
from merge_cli.planning.draft import Draft
from merge_cli.planning.encodings import Decision, EncodingChoice, problems
from merge_cli.planning.matches import AlikeMatches, TensorMatch, as_columns
from merge_cli.planning.output_slices import OutputSlice, output_slices
from merge_cli.planning.plan import (
    Action,
    Plan,
    TensorTask,
    input_names,
    is_stored_as,
    merged_dtype,
    promotion_note,
)
from merge_cli.planning.resolve import Resolver
from merge_cli.recipe.schema import Recipe


def decide_tasks(draft: Draft) -> Draft:
    """Decide for each match what is written: merged or copied, in which dtype, with which values.

    Raises:
        RecipeError: values that no tensor can be merged with, each once.
    """
    recipe, config_source = draft.recipe, draft.sources[draft.config_index]
    choice = EncodingChoice(recipe, config_source, draft.sources) if recipe.quantises else None
    tasks: list[TensorTask] = []
    refused: dict[str, Problem] = {}
    unfit: dict[str, str] = {}
    for part, matches in draft.matches.by_slice:
        decided, errors = tensor_tasks(
            recipe, draft.method, part, matches, choice, draft.copy_of, unfit
        )
        tasks += decided
        for error in errors:
            refused.setdefault(error, recipe.problem(part.key, error))
    unwritable = list(problems(recipe, config_source, tasks, unfit))
    if refused or unwritable:
        raise RecipeError([*refused.values(), *unwritable])
    tasks = [tasks[i] for i in natural_order([task.name for task in tasks])]
    notes = (*draft.matches.notes, *promotion_note(recipe, tasks))
    return draft.noting(notes, tasks=tuple(tasks))


def tensor_tasks(
    recipe: Recipe,
    method: Method,
    part: OutputSlice,
    matches: Sequence[TensorMatch],
    choice: EncodingChoice | None,
    copy_of: Mapping[str, str],
    unfit: dict[str, str],
) -> tuple[list[TensorTask], list[str]]:
    """The output tensors of one slice, and why some cannot be merged, each reason once.

    Args:
        unfit: filled: tensors that cannot be written as the recipe asks for it, and why.
    """
    resolver = Resolver(recipe, method, part.spec, [operand.spec for operand in part.operands])
    is_plain = choice is None and not copy_of and not resolver.filtered
    columns = as_columns(matches) if is_plain and matches else None
    alike = _tasks_alike(columns, resolver, part, recipe) if columns else None
    if alike:
        return alike
    pairs = [*_tasks_one_by_one(matches, resolver, part, recipe, choice, copy_of, unfit)]
    return [task for task, _ in pairs], [*dict.fromkeys(error for _, error in pairs if error)]


def _tasks_one_by_one(
    matches: Sequence[TensorMatch],
    resolver: Resolver,
    part: OutputSlice,
    recipe: Recipe,
    choice: EncodingChoice | None,
    copy_of: Mapping[str, str],
    unfit: dict[str, str],
) -> Iterator[tuple[TensorTask, str]]:
    """Each task, and why it cannot be merged (empty where it can)."""
    sources, ids, requested = _of_operands(part, recipe)
    for match in matches:
        if match.copied:
            (tensor,), decided = match.operands, Decision()
            if choice and choice.keeps:
                decided = choice.of_copy(match.name, tensor, tensor.default_dtype, match.source)
            if decided.problem:
                unfit[match.name] = decided.problem
            yield _copied(match, requested, decided), ""
            continue
        reference = match.base or match.operands[0]
        original = copy_of.get(match.name, "")
        names = input_names(match) if resolver.filtered and not original else ()
        resolved = resolver.of(original or match.name, match.layer_position.position, names)
        dtypes = [tensor.default_dtype for tensor in (reference, *match.operands)]
        dtype = requested or merged_dtype(dtypes)
        if choice and choice.keeps and not requested:
            dtype = reference.default_dtype
        decided = Decision()
        if choice and resolved.copies:
            decided = choice.of_copy(match.name, match.operands[0], dtype, sources[0])
        elif choice:
            decided = choice.of(match.name, reference, dtype)
        if decided.problem:
            unfit[match.name] = decided.problem
        if decided.encoding is not None:
            dtype = decided.encoding.label
        is_copy = resolved.copies and (
            isinstance(decided.encoding, Verbatim)
            or (not decided.encoding and is_stored_as(match.operands[0], dtype))
        )
        action: Action = "copy" if is_copy else "merge"
        task = TensorTask(
            match.name,
            reference.shape,
            dtype,
            action,
            match.operands,
            sources,
            ids,
            match.base,
            resolved.parameters,
            match.layer_position.group,
            _stored_as(dtypes),
            match.layer_position.position,
            decided.encoding,
            decided.kept,
            original,
        )
        yield task, resolved.error


def _of_operands(
    part: OutputSlice, recipe: Recipe
) -> tuple[tuple[int, ...], tuple[int, ...], str | None]:
    """For each operand its source and its index in the recipe; the dtype that is asked for."""
    sources = tuple(operand.source for operand in part.operands)
    ids = tuple(operand.recipe_index for operand in part.operands)
    return sources, ids, SAFETENSORS_NAMES[recipe.output_dtype] if recipe.output_dtype else None


def _tasks_alike(
    matches: AlikeMatches, resolver: Resolver, part: OutputSlice, recipe: Recipe
) -> tuple[list[TensorTask], list[str]] | None:
    """`tensor_tasks` where the method merges all of them; else None.

    As a rule it does. Columns take a fraction of the time of 100,000 tensors one by one.

    Args:
        resolver: one that looks at no names.
    """
    sources, ids, requested = _of_operands(part, recipe)
    positions = [*map(attrgetter("position"), matches.layer_positions)]
    first_at = dict(zip(reversed(positions), reversed(matches.names), strict=True))
    resolved_at = {at: resolver.of(first_at[at], at) for at in dict.fromkeys(positions)}
    if any(resolved.copies for resolved in resolved_at.values()):
        return None
    stored = _rows(matches.dtypes)
    rows = zip(
        matches.names,
        matches.shapes,
        _looked_up(stored, lambda row: requested or merged_dtype(row)),
        repeat("merge"),
        zip(*matches.operands, strict=True),
        repeat(sources),
        repeat(ids),
        repeat(None) if matches.bases is None else matches.bases,
        _looked_up(positions, lambda at: resolved_at[at].parameters),
        map(attrgetter("group"), matches.layer_positions),
        _looked_up(stored, _stored_as),
        positions,
        repeat(None),  # no encoding,
        repeat(None),  # nothing kept of one,
        repeat(""),  # and no copy
        strict=False,  # `repeat` never ends
    )
    errors = [resolved.error for resolved in resolved_at.values() if resolved.error]
    return [*map(partial(tuple.__new__, TensorTask), rows)], errors


def _rows(columns: Sequence[Sequence[str]]) -> Sequence[tuple[str, ...]]:
    """Columns as rows; one object many times where all rows are the same."""
    first = tuple(column[0] for column in columns)
    if all(column.count(text) == len(column) for column, text in zip(columns, first, strict=True)):
        return [first] * len(columns[0])
    return [*zip(*columns, strict=True)]


Key = TypeVar("Key")
Value = TypeVar("Value")


def _looked_up(keys: Sequence[Key], value_of: Callable[[Key], Value]) -> Iterator[Value]:
    """The value of each key, of which few differ."""
    if keys.count(keys[0]) == len(keys):
        return repeat(value_of(keys[0]))
    return map({key: value_of(key) for key in {*keys}}.__getitem__, keys)


def _stored_as(dtypes: Iterable[str]) -> str:
    """A note on dtypes that differ; empty where they do not."""
    different = sorted({*dtypes})
    return f"stored as {', '.join(different)}" if len(different) > 1 else ""


def _copied(match: TensorMatch, requested: str | None, decided: Decision) -> TensorTask:
    """A tensor that no method merges: as it is, but for the dtype that the recipe asks for."""
    (tensor,) = match.operands
    rounded = requested if requested and tensor.default_dtype in MERGEABLE else tensor.default_dtype
    if decided.encoding is not None:
        rounded = decided.encoding.label
    return TensorTask(
        match.name,
        tensor.shape,
        rounded,
        "copy",
        match.operands,
        (match.source,),
        (),
        group=match.layer_position.group,
        note=match.copied,
        encoding=decided.encoding,
    )


class TaskResolver:
    """A plan's tasks with the parameters of other recipes over the same models.

    Searches merge one plan again and again: only values differ between their recipes.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        labels = [source.label for source in plan.sources]
        self._specs = [
            operand.spec for operand in output_slices(plan.recipe, plan.method, labels)[0].operands
        ]

    def tasks(self, recipe: Recipe) -> list[TensorTask]:
        """The plan's tasks with another recipe's parameters.

        Raises:
            RecipeError: values that no tensor can be merged with.
        """
        listed = {spec.key: spec for spec in recipe.models}
        specs = [listed.get(spec.key, spec) for spec in self._specs]
        resolver = Resolver(recipe, self._plan.method, None, specs)
        tasks = []
        for task in self._plan.tasks:
            if task.action == "copy" and not task.parameters:  # copied, whatever the method
                tasks.append(task)
                continue
            resolved = resolver.of(task.formula_name, task.position)
            if resolved.error:
                raise RecipeError([recipe.problem("merge_method", resolved.error)])
            is_copy = resolved.copies and is_stored_as(task.operands[0], task.dtype)
            action: Action = "copy" if is_copy else "merge"
            tasks.append(task._replace(parameters=resolved.parameters, action=action))
        return tasks
