"""The plan of a merge of adapters with one another: their changes, on a base of zeros.

What a method makes of task vectors does not depend on where they start from. So the base is zeros,
each adapter a model whose tensors are its changes, and everything else is a merge like any other:
the same functions on the same spans with the same random numbers. A module that one adapter leaves
alone has a change of zeros there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge_cli.checkpoint.layout import OutputTensor, lay_out
from merge_cli.checkpoint.tensors import Tensor, Zeros
from merge_cli.errors import MergeCliError, MismatchError, Problem, SourceError
from merge_cli.lora.adapter import WEIGHTS, Adapter, open_alone
from merge_cli.lora.changes import LowRank, changes_of, embeddings_of, experts_of, notes_of
from merge_cli.lora.expert_factors import PatchedTensor
from merge_cli.lora.expert_updates import is_newer
from merge_cli.lora.update import UpdatedTensor
from merge_cli.methods.registry import get_method
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source

Changes = Mapping[str, UpdatedTensor | PatchedTensor]
ZERO_BASE = ModelRef("no change")
# A weighted sum of changes is a product of thin matrices again: it is never made.
LINEAR = frozenset(("soup", "task_arithmetic", "passthrough"))


def plan_adapters(recipe: Recipe) -> Plan:
    """Decide a merge of adapters from their headers.

    Raises:
        SourceError: an adapter that cannot be opened, or whose change depends on its model.
        MismatchError: adapters that are not of one architecture.
    """
    base = _base(recipe)
    adapters: dict[str, Adapter] = {}
    errors: list[MergeCliError] = []
    for spec in recipe.models:
        label = str(spec.model)
        try:
            adapters[label] = open_alone(spec.model, recipe.folder)
        except SourceError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else MismatchError([Problem(str(e)) for e in errors])
    changes = {label: changes_of(adapter, label) for label, adapter in adapters.items()}
    _refuse_both_ways(adapters)
    shapes = {name: item.shape for change in changes.values() for name, item in change.items()}
    made = {
        label: _source(label, adapters[label], change, shapes) for label, change in changes.items()
    }
    if base is not None and str(base) not in made:
        first = next(iter(adapters.values()))
        nothing = {name: Zeros(name, str(base), shape) for name, shape in shapes.items()}
        made[str(base)] = Source(str(base), first.root / "no change", {}, nothing, {}, planned=True)
    plan = make_plan(replace(recipe, base_model=base), made=made)
    return replace(
        plan,
        shards=tuple(lay_out(list(_expected(plan, adapters)), 1 << 62)),
        notes=tuple(_notes(plan, adapters, changes)),
    )


def _base(recipe: Recipe) -> ModelRef | None:
    """What the changes are of, which is zeros here; or one of the adapters, to start from."""
    method = get_method(recipe.merge_method)
    if method.base_is_source and recipe.base_model not in {spec.model for spec in recipe.models}:
        return None
    return recipe.base_model or (ZERO_BASE if method.needs_base else None)


def rank_of(plan: Plan) -> int | None:
    """Where matrices are cut; None where all of a weighted sum is kept."""
    output = plan.recipe.output
    if output is not None and (output.rank or output.energy):
        return output.rank
    if plan.method.name in LINEAR:
        return None
    return max(update.rank for task in plan.tasks for update in _updates(task))


def _updates(task: TensorTask) -> list[UpdatedTensor | PatchedTensor]:
    return [operand for operand in task.operands if isinstance(operand, LowRank)]


def _source(
    label: str,
    adapter: Adapter,
    changes: Changes,
    shapes: Mapping[str, tuple[int, ...]],
) -> Source:
    """An adapter as a model of changes."""
    tensors: dict[str, Tensor] = {name: Zeros(name, label, shape) for name, shape in shapes.items()}
    headers = {WEIGHTS: adapter.header}
    return Source(label, adapter.root, {}, {**tensors, **changes}, headers, adapter=adapter)


def _refuse_both_ways(adapters: Mapping[str, Adapter]) -> None:
    ways = {bool(adapter.config.get("fan_in_fan_out")) for adapter in adapters.values()}
    if len(ways) > 1:
        message = "some adapters are of layers stored [in, out] (fan_in_fan_out), and some are not"
        raise MismatchError([Problem(message)], "the adapters are of different models")
    orders = {
        is_newer(item.config)
        for item in adapters.values()
        if any(stack.shape[0] == stack.shape[1] for stack in experts_of(item).values())
    }
    if len(orders) > 1:
        message = "some were written by PEFT up to 0.19.0, which orders square factors of experts "
        message += "otherwise: merge the models, `BASE+ADAPTER`, instead"
        raise MismatchError([Problem(message)], "the adapters' experts do not mean the same")


def _expected(plan: Plan, adapters: Mapping[str, Adapter]) -> list[OutputTensor]:
    """The adapter's tensors, of the largest ranks that they can have."""
    most = rank_of(plan)
    result = []
    for task in plan.tasks:
        rank = min(task.shape)
        if plan.method.name in LINEAR:
            rank = min(rank, sum(update.rank for update in _updates(task)))
        rank = rank if most is None else min(rank, most)
        result += [
            OutputTensor(f"{task.name} A", "F32", (rank, task.shape[1])),
            OutputTensor(f"{task.name} B", "F32", (task.shape[0], rank)),
        ]
    return result


def _notes(
    plan: Plan,
    adapters: Mapping[str, Adapter],
    changes: Mapping[str, Changes],
) -> list[str]:
    output, most = plan.recipe.output, rank_of(plan)
    assert output is not None
    cut = "the whole weighted sum, of the sum of the ranks" if most is None else f"rank {most}"
    if output.energy:
        cut = f"{100 * output.energy:g} % of each matrix's sum of squares"
        cut += f", at most rank {most}" if most else ""
    notes = [f"an adapter is written: {cut}"]
    names = Counter(base_of(adapter) for adapter in adapters.values())
    if len(names) > 1:
        listed = ", ".join(f"{name or 'no name'} ({count})" for name, count in names.items())
        notes.append(f"the adapters name different models: {listed}")
    every = {name for change in changes.values() for name in change}
    notes += [
        f"{label} leaves {len(every - change.keys())} of {len(every)} modules as they are"
        for label, change in changes.items()
        if every - change.keys()
    ]
    notes += [f"{label}: {note}" for label, item in adapters.items() for note in notes_of(item)]
    if any(embeddings_of(adapter) for adapter in adapters.values()):
        notes.append(
            "embeddings have factors, too: a head that is tied to them follows only when "
            "the adapter is merged into the model"
        )
    return notes


def base_of(adapter: Adapter) -> str:
    """The model that an adapter says it is of."""
    return str(adapter.config.get("base_model_name_or_path") or "")


def base_name(adapters: Sequence[Adapter]) -> str | None:
    """The model that most of them are of, the first of several."""
    names = Counter(name for name in map(base_of, adapters) if name)
    return names.most_common(1)[0][0] if names else None
