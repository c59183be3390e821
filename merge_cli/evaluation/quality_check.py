"""A merged model evaluated where it was made: itself, what gates compare it with, and the gates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.engine.output import OutputWorkspace
from merge_cli.errors import Interrupted, UsageError
from merge_cli.evaluation.gates import check_gates, read_gates, require
from merge_cli.evaluation.live import load_tokenizer
from merge_cli.evaluation.result import Evaluation
from merge_cli.evaluation.rows import content_of, read_rows
from merge_cli.evaluation.run import evaluate_source, spec_for
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.summary import summary
from merge_cli.evaluation.task import DataTask
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

    def check(self, plan: Plan, out: Path | None = None) -> list[str]:
        """Find what is wrong before anything is merged, or a weight downloaded.

        Args:
            out: the folder of the merge, which may not hold what the tasks read; None where
                nothing is merged.

        Returns:
            what to know of the tasks: rows that the merge is made or chosen by.

        Raises:
            UsageError: a gate whose model takes no part; OUT holds what a task reads.
            SourceError: data that cannot be read, a row that is not as its task needs it, a
                tokenizer that cannot be loaded.
            ResourceError: a package that a task needs is missing.
        """
        if out is not None:
            teachers = [model.root for model in self._spec.models()]
            OutputWorkspace(out).refuse_holding([*self._spec.files(), *teachers])
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
        return overlap_notes(plan, self._spec)

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
            again = ", without --overwrite and --fresh," * (options.overwrite or options.fresh)
            hint = f"The merge is complete. The same command{again} evaluates it."
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
        opened = open_source(ModelRef(str(out)), out.parent)
        # By its name alone: the result lies in OUT, and may be published with it.
        merged = evaluate_source(replace(opened, label=out.name), spec, on_step)
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


def overlap_notes(plan: Plan, spec: EvalSpec) -> list[str]:
    """What to say of tasks that share rows with what a recipe learns, calibrates or searches on.

    Their numbers, and gates on them, speak of text that the merge, or a stage of it, was made for.

    Raises:
        RecipeError: a wrong objective.
        SourceError: data that cannot be read.
    """
    contents: set[bytes] = set()
    for made in (plan, *plan.stages.values(), *plan.variants.values()):
        preparation = preparation_for(get_method(made.recipe.merge_method))
        if preparation is not None:
            contents |= preparation.contents_used(made.recipe)
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
