"""A merged model evaluated where it was made: itself, what gates compare it with, and the gates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.raw import write_error
from merge_cli.checkpoint.source import Source, fetch_weights, open_source
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.plan import Plan
from merge_cli.errors import Interrupted, UsageError
from merge_cli.evaluation.gates import check_gates, read_gates, require
from merge_cli.evaluation.result import Evaluation
from merge_cli.evaluation.run import Show, evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.summary import summary
from merge_cli.recipe.keys import nearest
from merge_cli.recipe.reference import ModelRef

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

    def check(self, plan: Plan) -> None:
        """Raise a UsageError for a gate whose model takes no part, before anything is merged."""
        for gate in self._gates:
            if gate.reference and _meant(gate.reference, plan).planned:
                what = f"'{gate.reference}' is a stage of this recipe, and gone once OUT is there"
                raise UsageError(what, hint="Make it by itself first, and name its folder.")

    def run(self, plan: Plan, out: Path, options: MergeOptions, show: Show) -> list[dict[str, Any]]:
        """Evaluate OUT and every model that a gate names; written into OUT, too.

        Returns:
            what `evaluation.summary` makes of it: OUT first.

        Raises:
            as `merge_cli.evaluate` does. OUT is complete whatever happens here.
        """
        spec = self._spec.changed(device=options.device, threads=options.threads)
        try:
            merged, others = self._evaluations(plan, out, spec, show)
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
        self, plan: Plan, out: Path, spec: EvalSpec, show: Show
    ) -> tuple[Evaluation, dict[str, Evaluation]]:
        """OUT's, and those of the models that gates name, by the names that they give them."""
        merged = evaluate_source(open_source(ModelRef(str(out)), out.parent), spec, show)
        others = {}
        for name in dict.fromkeys(g.reference for g in self._gates if g.reference):
            source = _meant(name, plan)
            fetch_weights(source, source.header_bytes)
            others[name] = evaluate_source(source, spec, show)
        return merged, others

    def require(self) -> None:
        """Raise a GateError if a gate is not met."""
        require(self._failures)


def _meant(name: str, plan: Plan) -> Source:
    """`base`, or a source by its name or the last part of it."""
    if name == "base" and plan.base is not None:
        return plan.sources[plan.base]
    for source in plan.sources:
        if name in (source.label, source.label.rstrip("/").rpartition("/")[2]):
            return source
    known = [source.label for source in plan.sources]
    raise UsageError(f"'{name}' is none of the models of this recipe.", hint=nearest(name, known))
