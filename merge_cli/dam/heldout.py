"""How far a merged model is from each teacher, on rows that nothing is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

from merge_cli.dam.data import Dataset
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Batch, Forward, LossSums
from merge_cli.dam.losses import DistillationLoss, TeacherTargets
from merge_cli.evaluation.forward import Example, micro_batches, padded
from merge_cli.evaluation.teachers import Predictions
from merge_cli.options import OnProgress, Progress

_OBJECTIVE = DistillationLoss({"kl": 1.0, "cross_entropy": 1.0})


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
    def from_json(score: Mapping[str, Any]) -> HeldOutScore:
        return HeldOutScore(score["kl"], score["loss"])


class HeldOut:
    """Held-out batches with their teachers' predictions, ready to be asked again and again.

    A data set without held-out rows takes no part; without any there is nothing to measure.

    Args:
        rows: of each data set: its validation rows, or its test rows.
        predictions: of its teacher, for these rows.
        tokens: in one batch, at most.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        rows: Sequence[Sequence[Example]],
        predictions: Sequence[Predictions],
        tokens: int,
    ) -> None:
        self._batches: dict[str, list[Batch]] = {}
        for dataset, examples, teacher in zip(datasets, rows, predictions, strict=True):
            if not examples:  # the record says whose
                continue
            counted = sum(example.counted for example in examples)
            groups = micro_batches(range(len(examples)), examples, tokens)
            self._batches[dataset.name] = [
                make_batch(group, examples, teacher, 1.0 / counted) for group in groups
            ]
        self.passes = self.tokens = 0

    def reporter(self, note: str, world: World, on_progress: OnProgress) -> Callable[[], None]:
        """What `score` may call between batches to say how far it is."""
        done = count()
        total = -(-sum(map(len, self._batches.values())) // world.size)

        def between() -> None:
            number = min(next(done), total)
            on_progress(Progress("measure", number, total, note, "batches"))

        return between

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

        scores: dict[str, list[float]] = {}
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
                scores[name] = both.tolist()
        return HeldOutScore(
            {name: kl for name, (kl, _) in scores.items()},
            {name: loss for name, (_, loss) in scores.items()},
        )


@dataclass(frozen=True)
class BatchItem:
    """One sequence of a batch.

    Attributes:
        predicted: its teacher's predictions, as `Predictions.of` gives them; None asks no teacher.
        weight: of each of its counted tokens.
        owner: number of its data set.
    """

    example: Example
    predicted: tuple[Any, Any, Any] | None
    weight: float
    owner: int = 0


def make_batch(
    numbers: Sequence[int],
    examples: Sequence[Example],
    predictions: Predictions | None,
    weight: float,
) -> Batch:
    """A batch of some examples of one data set, every counted token with the same weight."""
    return batch_of(
        [
            BatchItem(examples[i], None if predictions is None else predictions.of(i), weight)
            for i in numbers
        ]
    )


def batch_of(items: Sequence[BatchItem]) -> Batch:
    """A batch of sequences of any data sets; teachers are asked for all of them or for none."""
    import torch

    examples = [item.example for item in items]
    ids, mask, counted = padded(examples)
    labels = torch.cat([torch.tensor(example.ids[example.first :]) for example in examples]).long()
    counts = torch.tensor([example.counted for example in examples])
    weights = torch.tensor([item.weight for item in items], dtype=torch.float64)
    owners = torch.tensor([item.owner for item in items])
    targets = TeacherTargets(
        labels, weights.repeat_interleave(counts), owners=owners.repeat_interleave(counts)
    )
    parts = [item.predicted for item in items if item.predicted is not None]
    if parts:
        targets = replace(
            targets,
            ids=torch.cat([kept for kept, _, _ in parts]).long(),
            logp=torch.cat([logp for _, logp, _ in parts]),
            tail=None if parts[0][2] is None else torch.cat([tail for _, _, tail in parts]),
        )
    return Batch(ids, mask, counted, targets)
