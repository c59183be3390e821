"""The loop: batches of every data set, one backward pass each, a step; measured now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from merge_cli.dam import rollouts
from merge_cli.dam.checkpoint import Position, TrainingWorkspace
from merge_cli.dam.data import Order
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Forward, LossSums
from merge_cli.dam.heldout import BatchItem, HeldOut, HeldOutScore, batch_of
from merge_cli.dam.losses import DistillationLoss
from merge_cli.dam.optimizers import rate_at
from merge_cli.dam.plan import TrainingPlan
from merge_cli.dam.rollouts import Sampler
from merge_cli.dam.student import Student
from merge_cli.errors import NonFiniteError
from merge_cli.evaluation.forward import micro_batches
from merge_cli.evaluation.teachers import Predictions
from merge_cli.options import OnProgress
from merge_cli.recipe.training import ROLLOUTS_TERM, Training

_SMALLER = "Use a smaller learning_rate, or dtype float32 or bfloat16."
# Of what training costs, for measuring while it goes on; a forward pass is a third of a step's.
_MEASURING, _FORWARD = 0.1, 1 / 3
_START_SCALE, _GROW_AFTER = 1024.0, 200  # of float16 losses

OnStep = Callable[[Mapping[str, Any], Position], None]  # a step's record


class Trainer:
    """One training run.

    Args:
        predictions: of each data set's train rows; None where the loss asks no teacher.
        position: where to begin, where there is no checkpoint.
        stopping: whether the user wants to stop; asked between steps.
    """

    def __init__(
        self,
        decided: TrainingPlan,
        student: Student,
        forward: Forward,
        predictions: Sequence[Predictions | None],
        held_out: HeldOut | None,
        folder: TrainingWorkspace,
        world: World,
        position: Position,
        *,
        on_step: OnStep,
        on_progress: OnProgress,
        stopping: Callable[[], bool],
    ) -> None:
        self._decided, self._student, self._forward = decided, student, forward
        self._predictions, self._held_out = predictions, held_out
        self._folder, self._world, self._told, self._stopping = folder, world, on_step, stopping
        self._on_progress = on_progress
        training = decided.training
        seed = decided.plan.recipe.seed
        self._orders = [Order(dataset, training, seed) for dataset in decided.datasets]
        self._objective = DistillationLoss(training.loss, training.temperature)
        self._sampler: Sampler | None = None
        if training.rollouts is not None:
            self._sampler = Sampler(
                student,
                decided.datasets,
                training.rollouts,
                seed=seed,
                top_k=None if training.top_k == "full" else int(training.top_k),
                batch_tokens=training.batch_tokens,
                context=decided.context,
            )
        self.position, self.best = position, dict[str, Any]()
        resumed = folder.resume(student)
        if resumed is not None:
            self.position, self.best = resumed
        elif decided.dtype == "float16":
            self.position.grad_scale = student.grad_scale = _START_SCALE

    @property
    def _training(self) -> Training:
        return self._decided.training

    def run(self) -> bool:
        """Train to the end; False if it was stopped before, with a checkpoint written.

        Raises:
            NonFiniteError: the loss, or a prediction on held-out rows, is not a number.
        """
        saved = time.monotonic()
        due = measured_steps(self._decided)
        if self.position.step == 0 and not self.position.measured:
            self._measure()
        while not self.position.ended:
            if self.position.step >= self._decided.steps:
                self.position.ended = "all steps"
                break
            began = time.monotonic()
            record = self._step(self.position.step)
            assert self.position.history is not None
            self.position.history.append(record)
            self.position.step += 1
            if self.position.step in due:
                self._measure()
            self.position.seconds += time.monotonic() - began
            self._told(record, self.position)
            stop = self._world.any(self._stopping())
            if stop or time.monotonic() - saved >= 60 * self._training.checkpoint_minutes:
                self._save()
                saved = time.monotonic()
            if stop:
                return False
        self._save()
        return True

    def _save(self) -> None:
        if self._world.first:
            self._folder.save(self._student, self.position, self.best)

    def _step(self, step: int) -> dict[str, Any]:
        """Forward and backward for every data set, then an update; what it found."""
        student, moved, reduced = self._student, 0, self._world.bytes_reduced
        rate = rate_at(self._training, step, self._decided.steps)
        batches = self._batches(step)
        sums, sampled = self._sums(), self._sums()
        continued = self._rollouts(step)
        for items in continued:
            batch = batch_of(items)
            assert self._training.rollouts is not None
            scale = student.grad_scale * self._training.rollouts.weight
            self._forward.loss(batch, rollouts.OBJECTIVE, sampled, scale).backward()
            moved += batch.tokens
        fused = self._decided.mode == "fused"
        for number, items in enumerate(batches):
            batch = batch_of(items)
            loss = self._forward.loss(batch, self._objective, sums, student.grad_scale)
            moved += batch.tokens
            if fused and number == len(batches) - 1:
                student.last_backward(loss, rate)
            else:
                loss.backward()
        if not fused:
            self._update(rate)
        self.position.bytes_reduced += self._world.bytes_reduced - reduced
        return self._record(step, rate, (sums, sampled), (moved, len(continued) + len(batches)))

    def _sums(self) -> LossSums:
        return LossSums(len(self._decided.datasets))

    def _rollouts(self, step: int) -> list[list[BatchItem]]:
        """This process's continuations of the step's rows, judged; none where it samples none.

        Their gradients are added up before the step's last backward pass moves anything.
        """
        about = self._training.rollouts
        if self._sampler is None or about is None or step % about.every:
            return []
        numbers = [order.batch(step) for order in self._orders]
        world = self._world
        rows = [
            (owner, i)
            for owner, batch in enumerate(numbers)
            for i in batch[world.rank :: world.size]
        ]
        items = self._sampler.items(step, rows, {d: len(batch) for d, batch in enumerate(numbers)})
        return self._grouped(items)

    def _batches(self, step: int) -> list[list[BatchItem]]:
        """This process's part of a step: sequences of all data sets together, by length.

        Together, because each backward pass reads and projects every source once. A token counts
        one part of all the tokens of its data set in this step, whoever else computes them, so that
        the loss does not depend on how a step is divided.
        """
        items: list[BatchItem] = []
        for owner, (dataset, order, predictions) in enumerate(
            zip(self._decided.datasets, self._orders, self._predictions, strict=True)
        ):
            numbers = order.batch(step)
            weight = 1.0 / sum(dataset.train[i].counted for i in numbers)
            for i in numbers[self._world.rank :: self._world.size]:
                predicted = None if predictions is None else predictions.of(i)
                items.append(BatchItem(dataset.train[i], predicted, weight, owner))
        return self._grouped(items)

    def _grouped(self, items: Sequence[BatchItem]) -> list[list[BatchItem]]:
        """In batches of at most `batch_tokens`."""
        examples = [item.example for item in items]
        groups = micro_batches(range(len(items)), examples, self._training.batch_tokens)
        return [[items[i] for i in group] for group in groups]

    def _update(self, rate: float) -> None:
        import math

        student, position = self._student, self.position
        reduce = self._world.add_up if self._world.size > 1 else None
        norm = student.update(rate, self._training.clip_norm, reduce)
        if math.isfinite(norm):
            grown = student.steps % _GROW_AFTER == 0 and self._decided.dtype == "float16"
            student.grad_scale *= 2 if grown else 1
        elif self._decided.dtype != "float16" or student.grad_scale <= 1:
            raise _not_finite(position.step)
        else:  # float16 overflowed: this step is skipped, the next one is scaled down
            student.grad_scale /= 2
            position.overflows += 1
        position.grad_scale = student.grad_scale

    def _record(
        self, step: int, rate: float, sums: tuple[LossSums, LossSums], cost: tuple[int, int]
    ) -> dict[str, Any]:
        """The step's losses by data set and term, over all processes; its tokens and passes.

        Args:
            sums: of the data's tokens, and of those that the student has sampled.
        """
        import torch

        datasets = [dataset.name for dataset in self._decided.datasets]
        weights = {name: weight for name, weight in self._training.loss.items() if weight}
        sums_of_datasets = sums[0].by_owner()
        about = self._training.rollouts
        if about is not None and not step % about.every:
            weights[ROLLOUTS_TERM] = about.weight
            for of_dataset, judged in zip(sums_of_datasets, sums[1].by_owner(), strict=True):
                of_dataset[ROLLOUTS_TERM] = judged.get("reverse_kl", 0.0)
        terms = dict(zip(datasets, sums_of_datasets, strict=True))
        names = sorted(weights)
        table = torch.tensor(
            [[term.get(name, 0.0) for name in names] for term in terms.values()],
            dtype=torch.float64,
        )
        spent = torch.tensor(cost, dtype=torch.float64)
        self._world.add_up([table, spent], gradients=False)
        self.position.tokens += int(spent[0])
        self.position.passes += int(spent[1])
        losses = {
            dataset: dict(zip(names, row, strict=True))
            for dataset, row in zip(terms, table.tolist(), strict=True)
        }
        penalties = dict(self._student.penalties_found)
        weighted = (
            weights[name] * value
            for of_dataset in losses.values()
            for name, value in of_dataset.items()
        )
        total = reduce(add, [*weighted, *penalties.values()], 0.0)
        if total != total or abs(total) == float("inf"):
            raise _not_finite(step)
        return {"step": step, "rate": rate, "loss": total, "terms": losses, "penalties": penalties}

    def _measure(self) -> None:
        """Held-out divergence; the best coefficients so far are remembered, or the last ones."""
        if self._held_out is None:
            return
        position, before = self.position, self._held_out.passes
        score = self._known_start()
        if score is None:
            note = f"held-out rows after {position.step} steps"
            between = self._held_out.reporter(note, self._world, self._on_progress)
            score = self._held_out.score(self._forward, self._world, between)
        position.held_out_passes += self._held_out.passes - before
        if not score.finite:
            message = f"on held-out rows the merge of step {position.step} predicts NaN or Inf"
            raise NonFiniteError(message, hint=_SMALLER)
        assert position.measured is not None
        position.measured.append({"step": position.step, **score.to_json()})
        # A step that imitates better and predicts the text worse than the merge that it began as
        # has learned what teachers say of rows that they have memorised.
        start = position.measured[0]
        most = start["mean_loss"] if start["step"] == 0 else float("inf")
        better = score.mean_kl < position.best_kl and score.mean_loss <= most
        if better or self._training.keep == "last":
            position.best_kl, position.best_step, position.stale = score.mean_kl, position.step, 0
            self.best = entries_of(self._student)
        else:
            position.stale += 1
            patience = self._training.patience
            if patience is not None and position.stale >= patience:
                position.ended = f"no improvement in {patience} measurements"

    def _known_start(self) -> HeldOutScore | None:
        """The score of the first step's coefficients, if they are a merge that was measured."""
        position = self.position
        if position.step or not position.start:
            return None
        assert position.static is not None
        return HeldOutScore.from_json(position.static[position.start])


def measured_steps(decided: TrainingPlan) -> set[int]:
    """The steps after which held-out rows are measured: the last one, and others before it.

    By default those at a half, a quarter, ... of the way, as many as cost no more than `_MEASURING`
    of the training together; the half in any case where no baseline is measured, which cost more.
    """
    steps, every = decided.steps, decided.training.evaluate_every
    if every is not None:
        return {steps, *range(every, steps, every)}
    rows = (example for data in decided.datasets for example in data.held_out)
    a_pass = _FORWARD * sum(len(example.ids) for example in rows)
    count = int(_MEASURING * decided.tokens / a_pass) if a_pass else 0
    count = count if decided.training.baselines else max(count, 2)
    due = {steps}
    while len(due) < count and min(due) > 1:
        due.add(-(-min(due) // 2))
    return due


def entries_of(student: Student) -> dict[str, Any]:
    """The coefficients as they are, as a file of coefficients holds them."""
    result: dict[str, Any] = {}
    for coefficients in student.coefficients.values():
        result |= coefficients.entries()
    return result


def _not_finite(step: int) -> NonFiniteError:
    message = f"the loss of step {step + 1} is not a number"
    return NonFiniteError(message, hint=_SMALLER)
