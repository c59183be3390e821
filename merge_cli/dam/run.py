"""From a recipe that learns to one that is resolved: teachers, training, measuring, the result."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.dam.assembly import assemble
from merge_cli.dam.checkpoint import Position, TrainingWorkspace, left_over
from merge_cli.dam.distributed import World, join_world, launched
from merge_cli.dam.forward import Forward
from merge_cli.dam.heldout import HeldOut
from merge_cli.dam.plan import TrainingPlan, kept_for, plan_training
from merge_cli.dam.record import LEARNED, StepLine, build_record, gate
from merge_cli.dam.start import begin
from merge_cli.dam.trainer import Trainer, entries_of
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.made_before import made_before
from merge_cli.errors import Interrupted
from merge_cli.evaluation.fingerprints import source_identity
from merge_cli.evaluation.live import fetch_everything, memory_errors
from merge_cli.evaluation.teachers import Predictions, Teacher
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.training import Training
from merge_cli.system.machine import torch_threads

# Options that change how training runs, not what comes of it.
_INDIFFERENT = {"residency", "checkpoint_minutes", "tensorboard", "preset"}
_FORMAT = 3
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
    with _interruptions() as stopping:
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
                    record = _learn(decided, folder, world, on_progress, stopping)
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
        record = folder.record() or {"datasets": []}
        recipe = with_coefficients(plan.recipe, folder.coefficients, record)
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
        if f.name not in _INDIFFERENT
    }
    used = sorted({*plan.operands, plan.config_index, *([] if plan.base is None else [plan.base])})
    about = {
        "format": _FORMAT,
        "versions": [version("merge-cli"), version("torch"), version("transformers")],
        "dials": options,
        "seed": plan.recipe.seed,
        "inputs": [plan.sources[i].fingerprint() for i in used],
        "data": [(dataset.source, dataset.digest) for dataset in decided.datasets],
        "how": [decided.device.partition(":")[0], decided.dtype, decided.mode, world.size],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _learn(
    decided: TrainingPlan,
    folder: TrainingWorkspace,
    world: World,
    on_progress: OnProgress,
    stopping: _Interruptions,
) -> dict[str, Any]:
    """Train, measure, and write the result.

    Raises:
        Interrupted: before the end; what is done is kept.
    """
    started = time.monotonic()
    taught = _teach(decided, world, on_progress, stopping)
    teaching = time.monotonic() - started
    plan, training = decided.plan, decided.training
    import torch

    on_progress(Progress("student", 0, 0, "the student is loaded"))
    student = assemble(
        plan,
        decided.targets,
        training,
        decided.residency,
        decided.device,
        getattr(torch, decided.dtype),
    )
    stopping.patient = True
    try:
        forward = Forward(student.net)
        validation = HeldOut(
            decided.datasets,
            [dataset.held_out for dataset in decided.datasets],
            taught.validation,
            training.batch_tokens,
        )
        tested = decided.datasets if decided.has_test else ()
        test = HeldOut(
            tested,
            [dataset.test for dataset in tested],
            taught.test[: len(tested)],
            training.batch_tokens,
        )
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
            on_step=line,
            on_progress=on_progress,
            stopping=stopping,
        )
        trainer.position.teaching += teaching
        try:
            if measured is not None and not trainer.position.static:
                begin(
                    decided,
                    student,
                    forward,
                    measured,
                    test,
                    trainer.position,
                    world,
                    on_progress=on_progress,
                    stopping=stopping,
                )
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
            on_batch = test.told("test rows", world, on_progress)
            trainer.position.tested[LEARNED] = test.score(forward, world, on_batch).to_json()
        for target in decided.targets:  # stored, but no parameter of the student
            if target.name not in entries:
                entries |= student.coefficients[target.name].entries()
        record = build_record(decided, trainer.position, forward.note, world)
        if world.first:
            folder.finish(entries, training.form, record)
        return record
    finally:
        student.close()


@dataclass(frozen=True)
class _Taught:
    """What teachers predict, for each data set.

    Attributes:
        train: None where the loss asks no teacher.
    """

    train: list[Predictions | None]
    validation: list[Predictions]
    test: list[Predictions]


def _teach(
    decided: TrainingPlan, world: World, on_progress: OnProgress, stopping: _Interruptions
) -> _Taught:
    """Each teacher over its own data, one at a time."""
    taught = _Taught([], [], [])
    for dataset in decided.datasets:
        source = decided.plan.sources[decided.plan.operands[dataset.source]]
        # Every byte is read: what is kept must be the predictions of exactly this model.
        teacher = Teacher(source, source_identity(source), decided.device, decided.dtype)
        share = (world.rank, world.size)

        def on_tokens(done: int, total: int, name: str = dataset.name) -> None:
            on_progress(Progress("teach", done, total, name, "tokens"))
            if world.size == 1 and stopping():
                message = "stopped while the teachers were asked"
                raise Interrupted(message, hint="The same command continues.")

        held_out = kept_for(decided.training, held_out=True)
        for rows, into in ((dataset.held_out, taught.validation), (dataset.test, taught.test)):
            into.append(teacher.predictions(rows, held_out, on_tokens, share=share))
        train = None
        if decided.training.needs_teachers:
            train = teacher.predictions(dataset.train, decided.kept, on_tokens, share=share)
        taught.train.append(train)
        teacher.close()
    world.wait()  # files that others have made are read from here on
    return taught


def _interrupted(folder: TrainingWorkspace, position: Position) -> Interrupted:
    message = f"stopped after {position.step} steps"
    return Interrupted(message, where=str(folder.path), hint="The same command continues.")


class _Interruptions:
    """Ctrl-C and SIGTERM. Called, it says whether one has come.

    Attributes:
        patient: whether the first one is only remembered, so that a step is not broken off
            half-way. The second one is not waited for: then the last checkpoint is what there is.
    """

    def __init__(self) -> None:
        self.patient = False
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def receive(self, number: int, frame: object) -> None:
        """A signal's handler."""
        if self._asked or not self.patient:
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def _interruptions() -> Iterator[_Interruptions]:
    """Tell of signals; at first one stops everything at once.

    Raises:
        Interrupted: that happened.
    """
    result = _Interruptions()
    if threading.current_thread() is not threading.main_thread():
        yield result
        return
    before = {kind: signal.signal(kind, result.receive) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield result
    except KeyboardInterrupt:
        raise Interrupted("stopped at once", hint="The same command continues.") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_coefficients(recipe: Recipe, coefficients: Path, record: Mapping[str, Any]) -> Recipe:
    """The recipe with what was learned: complete without data, which is only named."""
    requested = ("teacher", "files", "held_out_files", "digest")
    origin = [{name: item[name] for name in requested} for item in record["datasets"]]
    return replace(
        recipe,
        coefficients=str(coefficients),
        metadata={**recipe.metadata, "learned_from": origin},
        training=recipe.learning,
        models=tuple(replace(spec, data=None) for spec in recipe.models),
    )
