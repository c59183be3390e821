"""What happens before the first step: teachers are asked, whole merges made, a start chosen."""

from __future__ import annotations

from dataclasses import dataclass

from merge_cli.dam.assembly import assemble
from merge_cli.dam.checkpoint import Position, TrainingWorkspace
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Forward
from merge_cli.dam.heldout import HeldOut
from merge_cli.dam.interruptions import Interruptions
from merge_cli.dam.plan import TrainingPlan, kept_for, started_at
from merge_cli.dam.start import begin_at, choose_start
from merge_cli.dam.static import open_start
from merge_cli.dam.student import Student
from merge_cli.errors import Interrupted
from merge_cli.evaluation.fingerprints import source_identity
from merge_cli.evaluation.teachers import Predictions, Teacher
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.recipe.training import WHOLE_STARTS


@dataclass(frozen=True)
class Taught:
    """What teachers predict, for each data set.

    Attributes:
        train: None where the loss asks no teacher.
    """

    train: list[Predictions | None]
    validation: list[Predictions]
    test: list[Predictions]


def teach(
    decided: TrainingPlan, world: World, on_progress: OnProgress, stopping: Interruptions
) -> Taught:
    """Each teacher over its own data, one at a time."""
    taught = Taught([], [], [])
    for dataset in decided.datasets:
        source = decided.plan.sources[decided.plan.operands[dataset.source]]
        # Every byte is read: what is kept must be the predictions of exactly this model.
        teacher = Teacher(source, source_identity(source), decided.device, decided.dtype)
        share = (world.rank, world.size)
        on_progress(Progress("teach", 0, 0, f"the teacher {dataset.name} is loaded"))

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


def held_out_rows(decided: TrainingPlan, taught: Taught) -> tuple[HeldOut, HeldOut]:
    """Validation and test rows, with what their teachers predict."""
    tokens, tested = decided.training.batch_tokens, decided.datasets if decided.has_test else ()
    validation = HeldOut(
        decided.datasets,
        [dataset.held_out for dataset in decided.datasets],
        taught.validation,
        tokens,
    )
    test = HeldOut(tested, [dataset.test for dataset in tested], taught.test[: len(tested)], tokens)
    return validation, test


class Beginning:
    """From a training that is decided to a student that stands where it starts.

    Attributes:
        decided: the training; of changes from a whole merge, where it starts at one.
        position: with what was measured; a checkpoint's counts where there is one.
    """

    def __init__(
        self,
        decided: TrainingPlan,
        folder: TrainingWorkspace,
        options: MergeOptions,
        world: World,
        on_progress: OnProgress,
        stopping: Interruptions,
    ) -> None:
        self.decided, self._folder, self._options = decided, folder, options
        self._world, self._on_progress, self._stopping = world, on_progress, stopping
        saved = folder.position()
        self.position, self._resumes = saved or Position(), saved is not None

    def student(self, validation: HeldOut, test: HeldOut) -> Student:
        """The student at its start; training that is continued then moves it to its checkpoint.

        Raises:
            Interrupted: before it is there.
        """
        self._make_whole_merges()
        start = self.position.start
        if not self._resumes and not validation and self.decided.training.start in WHOLE_STARTS:
            start = self.position.start = str(self.decided.training.start)
        if start not in WHOLE_STARTS:
            student = self._assembled()
            if not self._resumes and validation:
                self._choose(student, validation, test)
                start = self.position.start
            if start not in WHOLE_STARTS:
                if start:
                    begin_at(self.decided, student, start)
                else:
                    student.write_all()
                return student
            student.close()
        self.decided = started_at(self.decided, self._folder.whole(start))
        student = self._assembled()
        begin_at(self.decided, student, start)
        return student

    def _make_whole_merges(self) -> None:
        """Every one that is not there; of a training that is continued, the one it starts from."""
        for merge in self.decided.static:
            if self._resumes and merge.method != self.position.start:
                continue
            if self._world.first:
                merge.make(self._folder.whole(merge.method), self._options, self._on_progress)
        self._world.wait()

    def _assembled(self) -> Student:
        import torch

        self._stopping.patient = False
        self._on_progress(Progress("student", 0, 0, "the student is loaded"))
        decided = self.decided
        student = assemble(
            decided.plan,
            decided.targets,
            decided.training,
            decided.residency,
            decided.device,
            getattr(torch, decided.dtype),
        )
        self._stopping.patient = True
        return student

    def _choose(self, student: Student, validation: HeldOut, test: HeldOut) -> None:
        whole = {
            merge.method: open_start(self._folder.whole(merge.method)).tensors
            for merge in self.decided.static
        }
        try:
            choose_start(
                self.decided,
                student,
                Forward(student.net),
                validation,
                test,
                whole,
                self.position,
                self._world,
                on_progress=self._on_progress,
                stopping=self._stopping,
            )
        except BaseException:
            student.close()
            raise
