"""Quality gates: conditions on an evaluation that a batch job can fail by.

    math.loss<=2.1                 a metric against a number
    base:japanese.loss             no worse than another model on the same examples
    base:japanese.loss+0.05        the same with a margin, in the metric's unit or (+2%) a share

Values are compared as they are. An evaluation is deterministic, so that a gate does not fail by
chance from one day to the next; whether a difference is one that other examples would show, too, is
said by its paired interval beside it.

A merged model evaluated where it was made: itself, what gates compare it with, and the gates.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import GateError, Interrupted, UsageError
from merge_cli.evaluation.live import load_tokenizer
from merge_cli.evaluation.result import Evaluation, Metric
from merge_cli.evaluation.rows import content_of, read_rows
from merge_cli.evaluation.run import evaluate_source, spec_for
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.summary import difference, summary
from merge_cli.evaluation.task import DataTask, Task
from merge_cli.methods.registry import get_method
from merge_cli.options import MergeOptions, OnProgress
from merge_cli.planning.plan import Plan
from merge_cli.planning.preparation import preparation_for
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source, fetch_weights
from merge_cli.system import libraries
from merge_cli.system.raw_io import write_error

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
    if match is None or margin is None:
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


FILE = "merge_evaluation.json"


class QualityCheck:
    """What a merge is to be evaluated on.

    Args:
        gates, no_worse: as on the command line (`gates.read_gates`).

    Raises:
        UsageError: a gate that cannot be read.
    """

    def __init__(self, spec: EvalSpec, gates: Sequence[str], no_worse: Sequence[str]) -> None:
        self._spec = spec
        self._gates = read_gates(gates, no_worse, spec.tasks)
        self._failures: dict[str, list[str]] = {}

    @property
    def spec(self) -> EvalSpec:
        """The tasks."""
        return self._spec

    def check(self, plan: Plan) -> list[str]:
        """Find what is wrong before anything is merged, or a weight downloaded.

        Returns:
            what to know of the tasks: rows that the merge is made or chosen by.

        Raises:
            UsageError: a gate whose model takes no part.
            SourceError: data that cannot be read, a row that is not as its task needs it, a
                tokenizer that cannot be loaded.
            ResourceError: a package that a task needs is missing.
        """
        libraries.require("torch", "evaluating the merge")
        for task in self._spec.tasks:
            task.check_data(self._spec.seed)
        for gate in self._gates:
            if gate.reference and _model_of(gate.reference, plan).planned:
                message = (
                    f"'{gate.reference}' is a stage of this recipe, and gone once OUT is there"
                )
                raise UsageError(message, hint="Make it by itself first, and name its folder.")
        source = plan.sources[plan.tokenizer_index]
        if not source.planned and not plan.aligned.files:
            load_tokenizer(source)
        return overlap_notes(plan.recipe, self._spec)

    def run(
        self, plan: Plan, out: Path, options: MergeOptions, on_step: OnProgress
    ) -> list[dict[str, Any]]:
        """Evaluate OUT and every model that a gate names; written into OUT, too.

        Returns:
            what `evaluation.summary` makes of it: OUT first.

        Raises:
            as `merge_cli.evaluate` does. OUT is complete whatever happens here.
        """
        spec = self._spec.changed(device=options.device, threads=options.threads)
        try:
            merged, others = self._evaluations(plan, out, spec, on_step)
        except Interrupted:
            hint = f"The merge is complete; `merge-cli evaluate {out}` measures it, too."
            raise Interrupted("stopped while evaluating", where=str(out), hint=hint) from None
        self._failures = {out.name: check_gates(self._gates, merged, others)}
        rows = summary([merged, *{other.digest: other for other in others.values()}.values()])
        text = json.dumps({"models": rows, "unmet": self._failures[out.name]}, indent=1)
        try:
            (out / FILE).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise write_error(error, out / FILE) from error
        return rows

    def _evaluations(
        self, plan: Plan, out: Path, spec: EvalSpec, on_step: OnProgress
    ) -> tuple[Evaluation, dict[str, Evaluation]]:
        """OUT's, and those of the models that gates name, by the names that they give them."""
        merged = evaluate_source(open_source(ModelRef(str(out)), out.parent), spec, on_step)
        others = {}
        for name in dict.fromkeys(g.reference for g in self._gates if g.reference):
            source = _model_of(name, plan)
            fetch_weights(source, source.header_bytes)
            others[name] = evaluate_source(source, spec, on_step)
        return merged, others

    def require(self) -> None:
        """Raise a GateError if a gate is not met."""
        require(self._failures)


def quality_check(
    recipe: Recipe, spec: EvalSpec | None, gates: Sequence[str], no_worse: Sequence[str]
) -> QualityCheck | None:
    """What a merge is to be evaluated on; None where nothing asks for it.

    Args:
        spec: the tasks; None for the recipe's own `eval:`.
        gates, no_worse: as on the command line (`read_gates`).

    Raises:
        RecipeError: a wrong `eval` section, every problem with its place.
        UsageError: a gate that cannot be read, or nothing to measure for it; an adapter; a
            sweep.
    """
    if not (spec or gates or no_worse or recipe.eval):
        return None
    if recipe.output is not None:
        hint = "Merge it into its model first: passthrough of BASE+OUT."
        raise UsageError("an adapter cannot be evaluated by itself", hint=hint)
    if recipe.sweep:
        hint = "`merge-cli compare RECIPE --data FILE` evaluates every variant."
        raise UsageError("a sweep has several results, and none to evaluate", hint=hint)
    if spec is None:
        spec = spec_for(recipe, None, ())
    if spec is None:
        hint = "Add --data FILE, --eval FILE, or `eval:` in the recipe."
        raise UsageError("a gate needs data to evaluate on", hint=hint)
    return QualityCheck(spec, gates, no_worse)


def overlap_notes(recipe: Recipe, spec: EvalSpec) -> list[str]:
    """What to say of tasks that share rows with what the recipe learns, calibrates or searches on.

    Their numbers, and gates on them, speak of text that the merge was made for.

    Raises:
        RecipeError: a wrong objective.
        SourceError: data that cannot be read.
    """
    preparation = preparation_for(get_method(recipe.merge_method))
    contents = preparation.contents_used(recipe) if preparation is not None else set()
    notes = []
    for task in spec.tasks:
        if not contents or not isinstance(task, DataTask):
            continue
        rows = read_rows(task.data)
        count = sum(content_of(row) in contents for row in rows)
        if count:
            message = (
                f"{count:,} of {len(rows):,} rows of the evaluation {task.name} are among those "
            )
            notes.append(f"{message}that this recipe is made or chosen by: its numbers flatter it")
    return notes


def _model_of(name: str, plan: Plan) -> Source:
    """`base`, or a source by its name or the last part of it."""
    if name == "base" and plan.base is not None:
        return plan.sources[plan.base]
    for source in plan.sources:
        if name in (source.label, source.label.rstrip("/").rpartition("/")[2]):
            return source
    labels = [source.label for source in plan.sources]
    raise UsageError(f"'{name}' is none of the models of this recipe.", hint=nearest(name, labels))
