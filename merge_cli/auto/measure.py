"""What a merge predicts of rows: losses by row, their mean, and paired intervals of differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.auto.rows import MeasuredRows
from merge_cli.evaluation.forward import micro_batches, padded
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric
from merge_cli.evaluation.summary import interval, resampled

Losses = Mapping[str, Metric]  # nats per token, by data set


def measure(live: LiveModel, rows: MeasuredRows, name: str) -> Metric:
    """The loss of the model as it is, with parts by row."""
    import torch

    owners = [number for number, row in enumerate(rows) for _ in row]
    examples = [item for row in rows for item in row]
    parts, weights = [0.0] * len(rows), [0.0] * len(rows)
    for batch in micro_batches(range(len(examples)), examples, live.batch_tokens):
        chosen = [examples[i] for i in batch]
        ids, mask, counted = padded(chosen)
        logits = live.logits(ids, mask)
        predicted = logits[counted.to(logits.device)].float()
        labels = torch.cat([torch.tensor(item.ids[item.first :]) for item in chosen]).long()
        losses = torch.nn.functional.cross_entropy(
            predicted, labels.to(logits.device), reduction="none"
        ).double()
        by_example = torch.split(losses.cpu(), [item.counted for item in chosen])
        for i, values in zip(batch, by_example, strict=True):
            parts[owners[i]] += float(values.sum())
            weights[owners[i]] += len(values)
    return Metric(name, "nats per token", "lower", parts, weights)


def mean_loss(losses: Losses) -> float:
    """The mean over data sets: each counts alike, however much text it has."""
    return math.fsum(metric.value for metric in losses.values()) / len(losses)


def gain(losses: Losses, than: Losses) -> tuple[float, float, float]:
    """How much lower the mean loss is, and the paired bootstrap's interval of that."""
    differences: list[Any] = [
        resampled(than[name], name) - resampled(losses[name], name) for name in losses
    ]
    bounds = interval(sum(differences) / len(differences))
    return mean_loss(than) - mean_loss(losses), bounds.low, bounds.high


def to_json(losses: Losses) -> dict[str, Any]:
    """Losses as a journal keeps them."""
    return {name: [list(metric.parts), list(metric.weights)] for name, metric in losses.items()}


def from_json(data: Mapping[str, Sequence[Sequence[float]]]) -> Losses:
    """The same, read again."""
    return {
        name: Metric(name, "nats per token", "lower", parts, weights)
        for name, (parts, weights) in data.items()
    }
