"""The plan of a sweep: the plans of its variants, and one over all that they read.

    variants  ─▶ a Plan each ─▶ one Plan, whose tasks read what any variant's task reads

Each task of the joint plan stands for the variants' tasks of the same tensor. Its chunks are cut
for all operands together; a block is read once, and every variant is merged from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from merge_cli.checkpoint.layout import Shard
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import Problem, RecipeError
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.sweep import SWEEP
from merge_cli.sources.source import Source


def plan_sweep(recipe: Recipe, *, shard_size: int) -> Plan:
    """Plan every variant, and the pass that makes all of them.

    Returns:
        the joint plan; its `variants` are what is written.

    Raises:
        RecipeError: a method that looks at data or learns, variants whose tensors differ.
        Others as `make_plan` does, for any variant.
    """
    plans = {
        name: make_plan(variant, shard_size=shard_size) for name, variant in recipe.sweep.items()
    }
    problems = [problem for name in plans for problem in _problems(recipe, name, plans)]
    if problems:
        raise RecipeError([*dict.fromkeys(problems)])
    first = next(iter(plans.values()))
    sources = _sources(plans.values())
    numbers = {source.root: number for number, source in enumerate(sources)}
    alike = zip(*(plan.tasks for plan in plans.values()), strict=True)
    tasks = tuple(_joint(tasks, [*plans.values()], numbers) for tasks in alike)
    notes = [f"{name}: {note}" for name, plan in plans.items() for note in plan.notes]
    return replace(
        first,
        recipe=recipe,
        sources=sources,
        base=None if first.base is None else numbers[first.sources[first.base].root],
        operands=tuple(sorted({n for task in tasks for n in task.sources})),
        config_index=numbers[first.sources[first.config_index].root],
        tasks=tasks,
        shards=tuple(chain(*(_inside(name, plan.shards) for name, plan in plans.items()))),
        notes=tuple(_shared(notes, len(plans))),
        compared=tuple(dict.fromkeys(chain(*(plan.compared for plan in plans.values())))),
        variants=plans,
    )


def operand_key(tensor: Tensor) -> Hashable:
    """What an operand is made of: variants that read the same share it."""
    return (*tensor.stored, tensor.name, tensor.shape, tensor.dtype, tensor.formula)


def _problems(recipe: Recipe, name: str, plans: Mapping[str, Plan]) -> list[Problem]:
    """Why a variant cannot be merged in one pass with the first."""
    plan, first = plans[name], next(iter(plans.values()))
    key = f"{SWEEP}.{name}" if f"{SWEEP}.{name}" in recipe.positions else SWEEP
    if plan.method.preparation or plan.recipe.coefficients:
        message = f"{plan.recipe.merge_method} merges with what was found out first"
        return [recipe.problem(SWEEP, message, "Write a recipe for each variant.")]
    if plan.recipe.eval is not None:
        hint = "Evaluate the variants with `merge-cli compare RECIPE --eval FILE`."
        return [recipe.problem("eval", "a sweep has several results, and none to evaluate.", hint)]
    if len({shard.folder for shard in plan.shards}) > 1 or plan.shards[0].folder:
        return [
            recipe.problem(SWEEP, "the models have several components", "Write one recipe each.")
        ]
    ours, theirs = _outline(plan), _outline(first)
    if ours != theirs:
        message = "its tensors are not those of the first variant: other layers, dtypes or bases"
        return [recipe.problem(key, message, "Write a recipe of its own for it.")]
    return []


def _outline(plan: Plan) -> list[Hashable]:
    """What all variants must have alike."""
    return [
        (task.name, task.shape, task.dtype, task.encoding, task.base and operand_key(task.base))
        for task in plan.tasks
    ]


def _sources(plans: Iterable[Plan]) -> tuple[Source, ...]:
    by_root = {source.root: source for plan in plans for source in plan.sources}
    return tuple(by_root.values())


def _joint(
    tasks: Sequence[TensorTask], plans: Sequence[Plan], numbers: Mapping[Path, int]
) -> TensorTask:
    """One task that reads every operand of these, each once."""
    operands: dict[Hashable, tuple[Tensor, int]] = {}
    for task, plan in zip(tasks, plans, strict=True):
        for operand, source in zip(task.operands, task.sources, strict=True):
            number = numbers[plan.sources[source].root]
            operands.setdefault(operand_key(operand), (operand, number))
    tensors, sources = zip(*operands.values(), strict=True)
    merged = any(task.action == "merge" for task in tasks)
    return tasks[0]._replace(
        action="merge" if merged else "copy",
        operands=tensors,
        sources=sources,
        ids=tuple(range(len(tensors))),
    )


def _inside(name: str, shards: Sequence[Shard]) -> list[Shard]:
    """A variant's shards, in its folder."""
    return [replace(shard, file=f"{name}/{shard.file}", folder=name) for shard in shards]


def _shared(notes: Sequence[str], count: int) -> list[str]:
    """Notes, those that every variant has once and without a name."""
    bare = [note.partition(": ")[2] for note in notes]
    result = [
        text if bare.count(text) == count else note for note, text in zip(notes, bare, strict=True)
    ]
    return list(dict.fromkeys(result))
