"""Where training starts: at the best merge that needs none, measured on validation rows.

Base, sources, uniform soup, task arithmetic at several scales, and the whole merges of `static`.
What is learned cannot end below the best of them that coefficients can express: the start is
measured, too, and the best step is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.tensors import Tensor
from merge_cli.dam.checkpoint import Position
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Forward
from merge_cli.dam.heldout import HeldOut, HeldOutScore
from merge_cli.dam.models import stored_tensors
from merge_cli.dam.plan import TrainingPlan
from merge_cli.dam.student import Student
from merge_cli.data.sequences import short_names
from merge_cli.errors import Interrupted
from merge_cli.options import OnProgress, Progress
from merge_cli.recipe.training import WHOLE_STARTS

LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of task arithmetic


def choose_start(
    decided: TrainingPlan,
    student: Student,
    forward: Forward,
    validation: HeldOut,
    test: HeldOut,
    whole: Mapping[str, Mapping[str, Tensor]],
    position: Position,
    world: World,
    *,
    on_progress: OnProgress,
    stopping: Callable[[], bool],
) -> None:
    """Measure what needs no training, and name the best of it in `position`, where it is asked for.

    Validation rows choose; the best one is then measured on test rows, which choose nothing. The
    student holds one of the merges afterwards.

    Args:
        whole: the tensors of whole merges, by their methods.
    """
    passes, start = validation.passes, decided.training.start
    compared: list[Mixture | Whole] = [Whole(name, tensors) for name, tensors in whole.items()]
    if decided.training.baselines:
        compared = [*compared_mixtures(decided), *compared]
    scores = baselines(
        student,
        forward,
        validation,
        compared,
        world,
        tell=lambda done, total, name: on_progress(
            Progress("baselines", done, total, name, "merges")
        ),
        stopping=stopping,
    )
    position.broken = [name for name, score in scores.items() if not score.finite]
    finite = {name: score for name, score in scores.items() if score.finite}
    position.static = {name: score.to_json() for name, score in finite.items()}
    position.held_out_passes += validation.passes - passes
    best = min(finite, key=lambda name: finite[name].mean_kl, default=None)
    if test and best is not None:
        next(item for item in compared if item.name == best).write(student)
        between = test.reporter(f"test rows with {best}", world, on_progress)
        position.tested = {best: test.score(forward, world, between).to_json()}
    if start == "best":
        chosen = best_start(compared, finite, decided.training.form)
        position.start = chosen.name if chosen is not None else ""
    elif start in finite:
        position.start = str(start)


def begin_at(decided: TrainingPlan, student: Student, name: str) -> None:
    """Every coefficient, learned or not, as in a merge that was measured."""
    weights = (0.0,) * len(decided.labels)  # no change from a whole merge, which is the base
    if name not in WHOLE_STARTS:
        weights = next(item.weights for item in compared_mixtures(decided) if item.name == name)
    for coefficients in student.coefficients.values():
        coefficients.begin(weights)
    student.write_all()


def start_candidates(decided: TrainingPlan) -> tuple[str, ...]:
    """The merges without training that are measured before it; none without held-out rows."""
    if not any(dataset.held_out for dataset in decided.datasets):
        return ()
    mixtures_named = compared_mixtures(decided) if decided.training.baselines else []
    names = [mixture.name for mixture in mixtures_named]
    return (*names, *(merge.method for merge in decided.static))


def compared_mixtures(decided: TrainingPlan) -> list[Mixture]:
    """Of this training's sources, and of its base where it has one for every tensor."""
    plan = decided.plan
    stored = stored_tensors(plan, decided.targets)
    return mixtures(
        decided.labels,
        has_base=all(item.base is not None for item in stored.values()),
        base_label=None if plan.base is None else plan.sources[plan.base].label,
    )


@dataclass(frozen=True)
class Mixture:
    """A merge without training: base * theta_0 + sum of weights * theta_i."""

    name: str
    base: float
    weights: tuple[float, ...]

    def write(self, student: Student) -> None:
        """Into the student's parameters."""
        student.write_mixture(self.base, self.weights)


@dataclass(frozen=True)
class Whole:
    """A merge whose tensors are stored."""

    name: str
    tensors: Mapping[str, Tensor]

    def write(self, student: Student) -> None:
        """Into the student's parameters."""
        student.write_stored(self.tensors)


def mixtures(labels: Sequence[str], *, has_base: bool, base_label: str | None) -> list[Mixture]:
    """What needs no training: base, each source, uniform soup, task arithmetic at several λ."""
    count = len(labels)
    result: list[Mixture] = []
    if has_base and base_label not in labels:
        result.append(Mixture("base", 1.0, (0.0,) * count))
    for i, name in enumerate(short_names(labels)):
        alone = tuple(float(i == j) for j in range(count))
        result.append(Mixture(f"source {name}", 0.0, alone))
    result.append(Mixture("uniform soup", 0.0, (1.0 / count,) * count))
    if has_base:
        # A base among the sources adds nothing to itself.
        moves_base = [label != base_label for label in labels]
        for scale in LAMBDAS:
            weights = tuple(scale * moves for moves in moves_base)
            result.append(Mixture(f"task arithmetic {scale:g}", 1.0 - math.fsum(weights), weights))
    return result


def baselines(
    student: Student,
    forward: Forward,
    held_out: HeldOut,
    compared: Sequence[Mixture | Whole],
    world: World,
    *,
    tell: Any,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, HeldOutScore]:
    """Held-out scores of merges without training.

    They pass through the student's own net; it holds the last of them afterwards. Some may predict
    no numbers (see `HeldOutScore.finite`).

    Raises:
        Interrupted: `stopping` says so.
    """

    def stop(asked: bool) -> None:
        if asked:
            message = "stopped while merges without training were measured"
            raise Interrupted(message, hint="The same command continues.")

    result = {}
    for number, item in enumerate(compared):
        tell(number, len(compared), item.name)
        stop(world.any(stopping()))
        item.write(student)

        # Processes stop together or not at all: within a merge only the one that is alone.
        def between(number: int = number, name: str = item.name) -> None:
            tell(number, len(compared), name)
            stop(world.size == 1 and stopping())

        result[item.name] = held_out.score(forward, world, between)
    return result


def best_start(
    compared: Sequence[Mixture | Whole], scores: Mapping[str, HeldOutScore], form: str
) -> Mixture | Whole | None:
    """The best of the merges that learning of a form can begin as; None where there is none.

    Changes of the base reach every mixture; sums of weights those alone that have no base in them.
    A whole merge becomes the base itself.
    """
    reached = [
        item
        for item in compared
        if item.name in scores
        and (form == "task_vector" or isinstance(item, Whole) or item.base == 0)
    ]
    return min(reached, key=lambda item: scores[item.name].mean_kl, default=None)
