"""Whole merges that learning can start from: made by the engine, kept as they were merged.

A Fisher merge weighs every element, RegMean solves for whole layers: neither is a sum of columns.
Learning that starts at one takes it as the base of all changes,

    W = S + sum of c_i * (W_i - S)        c = 0 at the start

so that its first step is S to the last bit. The recipe's base is one of the W_i, after the others:
a column may go back there, too. What learning ends with needs S, coefficients and sources, and no
data: S lies in OUT as a model of its own, and the resolved recipe names it as `base_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.calibration.data import Examples, longest_first
from merge_cli.calibration.plan import CalibrationPlan, plan_calibration
from merge_cli.calibration.run import calibrate
from merge_cli.dam.data import Dataset
from merge_cli.data.sequences import cut
from merge_cli.engine.merge import execute
from merge_cli.errors import SourceError
from merge_cli.evaluation.tokens import Encoded
from merge_cli.methods.registry import get_method
from merge_cli.options import MergeOptions, OnProgress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.statistics import Statistics, fitting_statistics
from merge_cli.recipe.training import WHOLE_STARTS
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source

# A third of what `fisher` looks at by default costs a fifth, and merges as well.
_EXAMPLES, _LENGTH = 96, 128


@dataclass(frozen=True)
class StaticMerge:
    """A whole merge, decided.

    Attributes:
        method: fisher or regmean.
        examples: what each source is looked at with, in the recipe's order; empty where it is all
            that its data says, so that statistics which `fisher` has gathered serve again.
        calibration: what is gathered, and of what; its plan lacks the statistics alone.
    """

    method: str
    examples: tuple[Examples, ...]
    calibration: CalibrationPlan

    @property
    def tokens(self) -> int:
        """That all sources together are looked at with."""
        return sum(part.examples.tokens for part in self.calibration.parts)

    def make(self, folder: Path, options: MergeOptions, on_progress: OnProgress) -> None:
        """Merge into a folder, unless it is there.

        Raises:
            as `calibrate` and `execute` do; the same call continues.
        """
        examples = self.examples or None
        plan = calibrate(self.calibration.plan, options, on_progress, examples=examples)
        whole = replace(options, copy_tokenizer=True, overwrite=True, fresh=False, statistics=False)
        execute(plan, folder, whole, on_progress=on_progress, finish=lambda *about: None)


def plan_static_merges(
    plan: Plan, datasets: Sequence[Dataset], context: int, device: str
) -> tuple[tuple[StaticMerge, ...], list[str]]:
    """The whole merges that a training begins with, and why others are not tried.

    Statistics are of rows to train on alone, so that what is held out can judge them.

    Args:
        datasets: with all of their rows to train on.
        context: tokens that the models take.

    Raises:
        as `plan_calibration` does, for the one that the recipe's `start` names.
    """
    recipe = plan.recipe
    start, of_source = recipe.learning.start, {item.source: item for item in datasets}
    if start != "best" and start not in WHOLE_STARTS:
        return (), []
    if recipe.training is not None and recipe.training.form == "soup":
        return (), ["sums of weights cannot begin at a merge by element or by layer"]
    if of_source.keys() != set(range(len(plan.operands))):
        why = "fisher and regmean need data of every source"
        if start != "best":
            raise SourceError(why, hint="Use `start: best`, or give every model `data:`.")
        return (), [why]
    result, left_out = [], []
    for method in WHOLE_STARTS:
        if start not in ("best", method):
            continue
        merge = make_plan(_recipe_of(recipe, method), shard_size=plan.shard_size)
        statistics = merge.recipe.statistics or Statistics()
        examples: tuple[Examples, ...] = ()
        if not _are_parts(recipe):
            examples = tuple(
                _examples_of(of_source[i], statistics, context) for i in range(len(plan.operands))
            )
        try:
            decided = plan_calibration(merge, device, examples=examples or None)
        except SourceError as error:
            if start != "best":
                raise
            left_out.append(f"{method} is not tried: {error}")
            continue
        result.append(StaticMerge(method, examples, decided))
    return tuple(result), left_out


def _are_parts(recipe: Recipe) -> bool:
    """Whether what is trained on is all that a recipe for the same data reads."""
    data = [spec.data for spec in recipe.source_specs if spec.data is not None]
    return all(item.part == "train" and not item.held_out for item in data)


def start_at(plan: Plan, folder: Path) -> Plan:
    """The plan of a training that starts at the merge in a folder: its base."""
    recipe = with_start(plan.recipe, folder)
    return make_plan(recipe, shard_size=plan.shard_size)


def with_start(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe, whose coefficients are of changes from the merge in a folder."""
    models, base = recipe.models, recipe.base_model
    if base is not None and all(spec.model != base for spec in models):
        models = (*models, SourceSpec(base, "base_model"))
    training = replace(recipe.learning, form="task_vector")
    return replace(recipe, base_model=ModelRef(str(folder)), models=models, training=training)


def open_start(folder: Path) -> Source:
    """A whole merge that has been made."""
    return open_source(ModelRef(str(folder)), folder.parent)


def _recipe_of(recipe: Recipe, method: str) -> Recipe:
    statistics = recipe.statistics or Statistics(examples=_EXAMPLES, max_length=_LENGTH)
    kind = get_method(method).gathers
    return recipe.with_result(
        method,
        training=None,
        statistics=fitting_statistics(statistics, kind),
        # Codes of few bits are too coarse to learn from.
        out_dtype=None if recipe.quantises else recipe.out_dtype,
        name=None,
    )


def _examples_of(dataset: Dataset, statistics: Statistics, context: int) -> Examples:
    length = min(statistics.max_length, context)
    pieces: list[Any] = []
    for example in dataset.train:
        if statistics.examples is not None and len(pieces) >= statistics.examples:
            break
        pieces += cut(Encoded(list(example.ids), example.first), length)
    return Examples(dataset.rows, tuple(longest_first(pieces[: statistics.examples])))
