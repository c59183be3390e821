"""How far a merged model is from each teacher, on rows that nothing is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from merge_cli.dam.data import Dataset, short_names
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Batch, Forward, LossSums
from merge_cli.dam.losses import DistillationLoss, TeacherTargets
from merge_cli.dam.student import Student
from merge_cli.errors import Interrupted
from merge_cli.evaluation.forward import Example, micro_batches, padded
from merge_cli.evaluation.teachers import Predictions

_OBJECTIVE = DistillationLoss({"kl": 1.0, "cross_entropy": 1.0})
LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of task arithmetic


@dataclass(frozen=True)
class HeldOutScore:
    """Divergence from the teachers and loss on the text, nats per token at temperature 1.

    Attributes:
        kl, loss: by data set.
    """

    kl: Mapping[str, float]
    loss: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """Whether the model predicts numbers; one that does not is no better or worse than any."""
        return all(map(math.isfinite, (*self.kl.values(), *self.loss.values())))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl.values()) / len(self.kl)

    @property
    def mean_loss(self) -> float:
        return sum(self.loss.values()) / len(self.loss)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_kl": self.mean_kl, "mean_loss": self.mean_loss}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> HeldOutScore:
        return HeldOutScore(found["kl"], found["loss"])


class HeldOut:
    """Held-out batches with their teachers' predictions, ready to be asked again and again.

    A data set without held-out rows takes no part; without any there is nothing to measure.
    """

    def __init__(
        self, datasets: Sequence[Dataset], predictions: Sequence[Predictions], tokens: int
    ) -> None:
        self._batches: dict[str, list[Batch]] = {}
        for dataset, known in zip(datasets, predictions, strict=True):
            rows = dataset.held_out
            if not rows:  # the record says whose
                continue
            count = sum(row.counted for row in rows)
            groups = micro_batches(range(len(rows)), rows, tokens)
            self._batches[dataset.name] = [
                make_batch(group, rows, known, 1.0 / count) for group in groups
            ]
        self.passes = self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._batches)

    def score(
        self, forward: Forward, world: World, between: Callable[[], None] = lambda: None
    ) -> HeldOutScore:
        """Of the net as it is; processes share the batches.

        Args:
            between: called before each of this process's batches; it may raise.
        """
        import torch

        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for name, batches in self._batches.items():
                sums = LossSums()
                for number, batch in enumerate(batches):
                    if number % world.size == world.rank:
                        between()
                        forward.loss(batch, _OBJECTIVE, sums)
                        self.passes += 1
                        self.tokens += batch.tokens
                read = sums.read()
                both = torch.tensor(
                    [read.get("kl", 0.0), read.get("cross_entropy", 0.0)], dtype=torch.float64
                )
                world.add_up([both], gradients=False)
                found[name] = both.tolist()
        return HeldOutScore(
            {name: kl for name, (kl, _) in found.items()},
            {name: loss for name, (_, loss) in found.items()},
        )


@dataclass(frozen=True)
class BatchItem:
    """One sequence of a batch.

    Attributes:
        known: its teacher's predictions, as `Predictions.of` gives them; None asks no teacher.
        weight: of each of its counted tokens.
        owner: number of its data set.
    """

    example: Example
    known: tuple[Any, Any, Any] | None
    weight: float
    owner: int = 0


def make_batch(
    numbers: Sequence[int], examples: Sequence[Example], known: Predictions | None, weight: float
) -> Batch:
    """A batch of some examples of one data set, every counted token with the same weight."""
    return batch_of(
        [BatchItem(examples[i], None if known is None else known.of(i), weight) for i in numbers]
    )


def batch_of(items: Sequence[BatchItem]) -> Batch:
    """A batch of sequences of any data sets; teachers are asked for all of them or for none."""
    import torch

    own = [item.example for item in items]
    ids, mask, counted = padded(own)
    labels = torch.cat([torch.tensor(one.ids[one.first :]) for one in own]).long()
    counts = torch.tensor([one.counted for one in own])
    weights = torch.tensor([item.weight for item in items], dtype=torch.float64)
    owners = torch.tensor([item.owner for item in items])
    targets = TeacherTargets(
        labels, weights.repeat_interleave(counts), owners=owners.repeat_interleave(counts)
    )
    parts = [item.known for item in items if item.known is not None]
    if parts:
        targets = replace(
            targets,
            ids=torch.cat([kept for kept, _, _ in parts]).long(),
            logp=torch.cat([logp for _, logp, _ in parts]),
            tail=None if parts[0][2] is None else torch.cat([tail for _, _, tail in parts]),
        )
    return Batch(ids, mask, counted, targets)


@dataclass(frozen=True)
class Mixture:
    """A merge without training: base * theta_0 + sum of weights * theta_i."""

    name: str
    base: float
    weights: tuple[float, ...]


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
        own = [label != base_label for label in labels]
        for scale in LAMBDAS:
            weights = tuple(scale * moves for moves in own)
            result.append(Mixture(f"task arithmetic {scale:g}", 1.0 - math.fsum(weights), weights))
    return result


def baselines(
    student: Student,
    forward: Forward,
    held_out: HeldOut,
    compared: Sequence[Mixture],
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
        student.write_mixture(item.base, item.weights)
        # Processes stop together or not at all: within a merge only the one that is alone.
        result[item.name] = held_out.score(
            forward, world, lambda: stop(world.size == 1 and stopping())
        )
    return result


def best_start(
    compared: Sequence[Mixture], scores: Mapping[str, HeldOutScore], form: str
) -> Mixture | None:
    """The best of the merges that coefficients of a form can begin as; None where there is none.

    Changes of the base reach every mixture; sums of weights those alone that have no base in them.
    """
    reached = [
        item
        for item in compared
        if item.name in scores and (form == "task_vector" or item.base == 0)
    ]
    return min(reached, key=lambda one: scores[one.name].mean_kl, default=None)
