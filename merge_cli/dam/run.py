"""From a recipe that learns to one that is resolved: teachers, training, measuring, the result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.dam.beginning import Beginning, held_out_rows, teach
from merge_cli.dam.checkpoint import Position, TrainingWorkspace, left_over
from merge_cli.dam.distributed import World, join_world, launched
from merge_cli.dam.forward import Forward
from merge_cli.dam.interruptions import Interruptions, interruptions
from merge_cli.dam.plan import TrainingPlan, plan_training
from merge_cli.dam.record import LEARNED, StepLine, build_record, gate
from merge_cli.dam.static import with_start
from merge_cli.dam.trainer import Trainer, entries_of
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.made_before import made_before
from merge_cli.errors import Interrupted
from merge_cli.evaluation.guards import memory_errors
from merge_cli.evaluation.live import fetch_everything
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.training import INDIFFERENT, WHOLE_STARTS, Training
from merge_cli.system.machine import torch_threads

# Options that change how training runs, not what comes of it.
_FORMAT = 5
START = "start"  # the folder in OUT of the merge that learning has started from
_SMALLER = (
    "Try a smaller batch_tokens, checkpointing: true, residency: disk, or dtype: bfloat16."
    " Changing residency alone continues; after other changes use --fresh."
)


@dataclass(frozen=True)
class Learned:
    """What training has left.

    Attributes:
        coefficients: the file.
        record: for the report; see docs/dam.md.
        folder: where both lie until the model is published.
        world: the processes that trained together.
    """

    coefficients: Path
    record: dict[str, Any]
    folder: TrainingWorkspace
    world: World

    def resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with what was learned: complete without data."""
        return resolved_recipe(recipe, self.folder, self.record)

    @property
    def folders(self) -> dict[str, Path]:
        """Models that belong into OUT, by name: the merge that learning has started from."""
        method = self.record["start"]
        return {START: self.folder.whole(method)} if method in WHOLE_STARTS else {}

    def discard(self) -> None:
        """Throw the workspace away, once OUT has what is in it, and let the others go."""
        self.folder.discard()
        self.world.close()


def learn(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    *,
    on_progress: OnProgress,
    require_improvement: bool = False,
) -> Learned:
    """Learn the coefficients that the plan's method lacks; continue where a run was killed.

    Args:
        target: OUT; work happens in OUT.training.
        require_improvement: refuse a result that is worse than the best static merge.

    Raises:
        SourceError, MismatchError, ResourceError: see `plan_training`.
        NonFiniteError: the loss is not a number.
        Interrupted: Ctrl-C or SIGTERM; the same command continues.
        GateError: `require_improvement` is not met. The coefficients are kept.
    """
    world = join_world()
    on_progress = on_progress if world.first else lambda progress: None
    with interruptions() as stopping:
        decided = plan_training(plan, options.device, world)
        fetch_everything(plan)
        inputs = inputs_of(plan)
        stopping.patient = world.size > 1  # one that leaves by itself would be waited for
        folder = TrainingWorkspace(
            target, work_key(decided, world), fresh=options.fresh, first=world.first
        )
        with folder:
            world.wait()
            record = folder.record()
            if record is None:
                with torch_threads(options.threads), memory_errors(str(folder.path), _SMALLER):
                    record = _learn(decided, folder, options, world, on_progress, stopping)
                world.wait()
                inputs.verify_or(folder.discard if world.first else lambda: None)
            world.wait()
        if world.any(stopping()):  # asked for where nobody looks: the merge must not begin
            message, hint = "stopped after training", "The same command continues."
            raise Interrupted(message, where=str(folder.path), hint=hint)
    if world.first:
        for line in record["warnings"]:
            on_progress(Progress("train", 0, 0, line))
        gate(record, require_improvement, folder.coefficients)
    return Learned(folder.coefficients, record, folder, world)


def published_report(plan: Plan, target: Path, options: MergeOptions) -> dict[str, Any] | None:
    """OUT's report, if a process that was killed before it could tidy up has made OUT by this work.

    What it has left of its training goes then; and where OUT may be replaced, it goes anyway. Only
    for a process that is alone: several would not all find the same.
    """
    folder = None if options.fresh or launched() > 1 else left_over(target)
    if folder is None:
        return None
    decided = plan_training(plan, options.device)
    fetch_everything(plan)
    report = None
    if work_key(decided, World()) == folder.key:
        record = folder.record() or {"datasets": [], "start": ""}
        recipe = resolved_recipe(plan.recipe, folder, record)
        report = made_before(make_plan(recipe, shard_size=plan.shard_size), target, options)
    if report is not None and "training" not in report:
        report = None
    if report is not None or options.overwrite:
        with folder:
            folder.discard()
    return report


def work_key(decided: TrainingPlan, world: World) -> str:
    """A digest of everything that the coefficients depend on."""
    plan = decided.plan
    options = {
        f.name: repr(getattr(decided.training, f.name))
        for f in fields(Training)
        if f.name not in INDIFFERENT
    }
    used = sorted({*plan.operands, plan.config_index, *([] if plan.base is None else [plan.base])})
    about = {
        "format": _FORMAT,
        "versions": [version("merge-cli"), version("torch"), version("transformers")],
        "dials": options,
        "statistics": repr(plan.recipe.statistics),
        "dtype": [plan.recipe.dtype, plan.recipe.out_dtype],
        "seed": plan.recipe.seed,
        "inputs": [plan.sources[i].fingerprint() for i in used],
        "data": [(dataset.source, dataset.digest) for dataset in decided.datasets],
        "how": [decided.device.partition(":")[0], decided.dtype, decided.mode, world.size],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _learn(
    decided: TrainingPlan,
    folder: TrainingWorkspace,
    options: MergeOptions,
    world: World,
    on_progress: OnProgress,
    stopping: Interruptions,
) -> dict[str, Any]:
    """Train, measure, and write the result.

    Raises:
        Interrupted: before the end; what is done is kept.
    """
    started = time.monotonic()
    taught = teach(decided, world, on_progress, stopping)
    teaching = time.monotonic() - started
    training = decided.training
    validation, test = held_out_rows(decided, taught)
    beginning = Beginning(decided, folder, options, world, on_progress, stopping)
    student = beginning.student(validation, test)
    decided, forward = beginning.decided, Forward(student.net)
    try:
        measured = validation if validation else None
        # Beside OUT, and not in the folder that goes when OUT is published.
        board = folder.path.with_suffix(".tensorboard") if training.tensorboard else None
        line = StepLine(decided, board, on_progress, world)
        trainer = Trainer(
            decided,
            student,
            forward,
            taught.train,
            measured,
            folder,
            world,
            beginning.position,
            on_step=line,
            on_progress=on_progress,
            stopping=stopping,
        )
        trainer.position.teaching += teaching
        try:
            finished = trainer.run()
        finally:
            line.close()
        if not finished:
            raise _interrupted(folder, trainer.position)
        entries = trainer.best or entries_of(student)
        if test:
            for name in student.merged_parameters:
                student.coefficients[name].show(entries)
            student.write_all()
            assert trainer.position.tested is not None
            on_batch = test.reporter("test rows", world, on_progress)
            trainer.position.tested[LEARNED] = test.score(forward, world, on_batch).to_json()
        for target in decided.targets:  # stored, but no parameter of the student
            if target.name not in entries:
                entries |= student.coefficients[target.name].entries()
        record = build_record(decided, trainer.position, forward.note, world)
        if world.first:
            folder.finish(entries, decided.training.form, record)
        return record
    finally:
        student.close()


def _interrupted(folder: TrainingWorkspace, position: Position) -> Interrupted:
    message = f"stopped after {position.step} steps"
    return Interrupted(message, where=str(folder.path), hint="The same command continues.")


def resolved_recipe(recipe: Recipe, folder: TrainingWorkspace, record: Mapping[str, Any]) -> Recipe:
    """The recipe with what was learned: complete without data, which is only named."""
    requested = ("teacher", "files", "held_out_files", "digest")
    origin = [{name: item[name] for name in requested} for item in record["datasets"]]
    if record["start"] in WHOLE_STARTS:
        recipe = with_start(recipe, folder.whole(record["start"]))
    return replace(
        recipe,
        coefficients=str(folder.coefficients),
        metadata={**recipe.metadata, "learned_from": origin},
        training=recipe.learning,
        statistics=None,
        models=tuple(replace(spec, data=None) for spec in recipe.models),
    )
