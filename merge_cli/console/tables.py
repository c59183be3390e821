"""What the plan's table and the JSON outputs hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.markup import escape

if TYPE_CHECKING:
    from merge_cli.engine.plan import Plan, TensorTask
    from merge_cli.methods.registry import Method


def plan_json(plan: Plan, peak: int) -> dict[str, Any]:
    """The plan as data, for `--json`."""
    return {
        "method": plan.recipe.merge_method,
        "base": plan.sources[plan.base].label if plan.base is not None else None,
        "sources": [plan.sources[i].label for i in plan.operands],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": peak,
        "parameters": plan.parameter_count,
        "shards": [{"file": shard.file, "bytes": shard.size} for shard in plan.shards],
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": task.name,
                "shape": list(task.shape),
                "dtype": task.dtype,
                "action": task.action,
                "from": [plan.sources[i].label for i in task.sources],
                "parameters": dict(task.parameters),
                "note": task.note,
            }
            for task in plan.tasks
        ],
    }


def method_json(method: Method) -> dict[str, Any]:
    """A method as data, for `--json`."""
    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "summary": method.summary,
        "paper": method.paper,
        "needs_base": method.needs_base,
        "sources": list(method.count),
        "parameters": [
            {
                "name": p.name,
                "default": p.default,
                "per_model": p.per_model,
                "allowed": p.allowed,
                "doc": p.doc,
            }
            for p in method.parameters.values()
        ],
    }


def table_rows(tasks: Sequence[TensorTask], every: bool) -> Iterator[tuple[str, list[TensorTask]]]:
    """One row for each tensor, or for each run of layers that are treated alike."""
    if every:
        for task in tasks:
            yield escape(task.name), [task]
        return
    layers = [list(group) for _, group in groupby(tasks, key=lambda task: task.group)]
    for _, run in groupby(layers, key=_likeness):
        alike = list(run)
        first, last = alike[0][0].group, alike[-1][0].group
        label = first if first == last else f"{first} … {last.rpartition('.')[2]}"
        yield escape(label), [task for layer in alike for task in layer]


def _likeness(layer: Sequence[TensorTask]) -> object:
    """Equal for layers that one row of the table describes."""
    first = layer[0]
    if first.group == first.name:
        return first.name
    stack = first.group.rpartition(".")[0]
    treated = tuple((t.shape, t.dtype, t.action, t.note, repr(t.parameters)) for t in layer)
    return stack, treated


def particulars(tasks: Sequence[TensorTask], shared: Mapping[str, str]) -> str:
    """What is particular to these tensors; with counts where they differ among themselves."""
    texts = Counter(
        "; ".join(
            filter(
                None, [", ".join(t for n, t in _shown(task).items() if n not in shared), task.note]
            )
        )
        for task in tasks
    )
    if len(texts) == 1:
        return next(iter(texts))
    return "\n".join(f"{count}× {text or 'nothing else'}" for text, count in texts.items())


def shared_settings(tasks: Sequence[TensorTask]) -> dict[str, str]:
    """The parameters that are the same for every merged tensor, by name, as text."""
    merged = [_shown(task) for task in tasks if task.parameters]
    first = merged[0] if merged else {}
    return {name: text for name, text in first.items() if all(m.get(name) == text for m in merged)}


def _shown(task: TensorTask) -> dict[str, str]:
    """Resolved parameters as text; what is derived from another (None) is left out."""
    shown = {}
    for name, value in task.parameters.items():
        values = value if isinstance(value, list) else [value]
        if any(v is not None for v in values):
            text = " ".join(f"{v:.4g}" if type(v) is float else str(v).lower() for v in values)
            shown[name] = f"{name} {text}"
    return shown
