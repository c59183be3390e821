"""Quality gates: conditions on an evaluation that a batch job can fail by.

    math.loss<=2.1                 a metric against a number
    base:japanese.loss             no worse than another model on the same examples
    base:japanese.loss+0.05        the same with a margin, in the metric's unit or (+2%) a share

Values are compared as they are. An evaluation is deterministic, so that a gate does not fail by
chance from one day to the next; whether a difference is one that other examples would show, too, is
said by its paired interval beside it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merge_cli.errors import GateError, UsageError
from merge_cli.evaluation.result import Evaluation, Metric
from merge_cli.evaluation.summary import difference
from merge_cli.evaluation.task import Task
from merge_cli.recipe.fields import nearest

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*(?P<metric>[^<>=]+?)\s*(?P<sign><=|>=|<|>)\s*(?P<number>[^<>=\s]+)\s*")
_NO_WORSE = re.compile(
    r"\s*(?P<model>.+?):(?P<metric>[^:+]+?)(?:\s*\+\s*(?P<margin>[\d.eE-]+)\s*(?P<share>%?))?\s*"
)
Metrics = Mapping[str, Sequence[str]]  # task -> its metrics, as far as they are known


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        text: as the user wrote it.
        task, metric: of the value; an empty metric is the task's primary one.
        sign, number: of a condition on a number.
        reference: of a comparison, the other model as the user named it.
        margin, relative: how much worse is still accepted, in the unit or as a share of the value.
    """

    text: str
    task: str
    metric: str
    sign: str = ""
    number: float = 0.0
    reference: str = ""
    margin: float = 0.0
    relative: bool = False


def read_gates(
    gates: Sequence[str], no_worse: Sequence[str], tasks: Sequence[Task]
) -> tuple[Gate, ...]:
    """Gates as they are given on a command line, checked before anything is computed.

    Args:
        gates: conditions on a number.
        no_worse: comparisons with another model.

    Raises:
        UsageError: not of the form above, or a task that is not evaluated.
    """
    metrics = {task.name: task.metrics for task in tasks}
    return (
        *(_on_number(text, metrics) for text in gates),
        *(_on_model(text, metrics) for text in no_worse),
    )


def check_gates(
    gates: Sequence[Gate], evaluation: Evaluation, references: Mapping[str, Evaluation]
) -> list[str]:
    """Why each gate that is not met is not met; empty when all are.

    Args:
        references: the other models, by the names that gates give them.

    Raises:
        UsageError: a task has no such metric.
    """
    return [why for gate in gates if (why := _unmet(gate, evaluation, references))]


def require(failures: Mapping[str, Sequence[str]]) -> None:
    """Fail if any model fails a gate.

    Raises:
        GateError: with every unmet gate of every model.
    """
    lines = [f"{model}: {line}" for model, unmet in failures.items() for line in unmet]
    if lines:
        count = len(lines)
        message = f"{count} quality gate{'s are' if count > 1 else ' is'} not met"
        raise GateError("\n  ".join([message, *lines]))


def _on_number(text: str, metrics: Metrics) -> Gate:
    match = _GATE.fullmatch(text)
    number = _number(match["number"]) if match else None
    if match is None or number is None:
        raise UsageError(f"'{text}' is not a gate", hint='Write it like "math.loss<=2.1".')
    task, metric = _named(match["metric"], text, metrics)
    return Gate(text, task, metric, sign=match["sign"], number=number)


def _on_model(text: str, metrics: Metrics) -> Gate:
    match = _NO_WORSE.fullmatch(text)
    margin = _number(match["margin"] or "0") if match else None
    if match is None or margin is None or margin < 0:
        hint = "Write it like base:japanese.loss or base:japanese.loss+2%."
        raise UsageError(f"'{text}' does not name a model and a metric", hint=hint)
    task, metric = _named(match["metric"], text, metrics)
    relative = match["share"] == "%"
    return Gate(
        text,
        task,
        metric,
        reference=match["model"],
        relative=relative,
        margin=margin / 100 if relative else margin,
    )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _named(text: str, gate: str, metrics: Metrics) -> tuple[str, str]:
    """Task and metric; a task's own name may contain dots."""
    if text in metrics:
        return text, ""
    task, _, metric = text.rpartition(".")
    if task not in metrics:
        hint = nearest(task or text, metrics)
        raise UsageError(f"'{gate}': no task '{task or text}' is evaluated.", hint=hint)
    if metrics[task] and metric not in metrics[task]:
        raise UsageError(
            f"'{gate}': {task} has no metric '{metric}'.", hint=nearest(metric, metrics[task])
        )
    return task, metric


def _unmet(gate: Gate, evaluation: Evaluation, references: Mapping[str, Evaluation]) -> str:
    metric = _metric(gate, evaluation)
    value = f"{metric.name} {metric.value:.4g}"
    if not gate.reference:
        met = _OPERATORS[gate.sign](metric.value, gate.number)
        return "" if met else f"{gate.text} — {gate.task} has {value}"
    other = _metric(gate, references[gate.reference])
    room = gate.margin * (abs(other.value) if gate.relative else 1.0)
    limit = other.value + (room if metric.better == "lower" else -room)
    if not metric.worse(limit):
        return ""
    paired = difference(metric, other, gate.task)
    ends = f", 95 % from {paired.low:+.4g} to {paired.high:+.4g}" if paired else ""
    return (
        f"{gate.text} — {gate.task} has {value} against {other.value:.4g} "
        f"(difference {metric.value - other.value:+.4g}{ends})"
    )


def _metric(gate: Gate, evaluation: Evaluation) -> Metric:
    task = evaluation[gate.task]
    if not gate.metric:
        return task.primary
    if gate.metric not in task.metrics:
        message = f"'{gate.text}': {gate.task} has no metric '{gate.metric}'."
        raise UsageError(message, hint=nearest(gate.metric, task.metrics))
    return task[gate.metric]
