"""Held-out loss: what a model pays for text that it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from merge_cli.errors import SourceError
from merge_cli.evaluation.forward import Window, add_up, forward, windows
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.rows import Encoded, Row, encode, read_rows
from merge_cli.evaluation.task import DataTask, Tell, option


@dataclass(frozen=True, kw_only=True)
class LossTask(DataTask):
    """Negative log-likelihood of text: per token, and per byte, which compares vocabularies."""

    kind = "loss"
    metrics = ("loss", "bits_per_byte")

    stride: int | None = option(
        None,
        "tokens that count in each window of a text longer than the context; default half of it",
        least=1,
    )

    def score(self, live: LiveModel, tell: Tell) -> TaskResult:
        import torch

        rows, encoded, items = text_windows(self, live, self.stride)
        nats = torch.zeros(len(rows), dtype=torch.float64)
        for batch in forward(live, items, tell):
            losses = torch.nn.functional.cross_entropy(
                batch.logits, batch.targets, reduction="none"
            )
            nats += add_up(losses, batch.examples, len(rows))
        tokens = [float(len(row.ids) - row.first) for row in encoded]
        sizes = [
            float(len(live.tokenizer.decode(row.ids[row.first :]).encode())) for row in encoded
        ]
        parts = nats.tolist()
        bits = [part / math.log(2) for part in parts]
        metrics = {
            "loss": Metric("loss", "nats per token", "lower", parts, tokens),
            "bits_per_byte": Metric("bits_per_byte", "bits per byte", "lower", bits, sizes),
        }
        examples = [
            {"line": row.line, "nats": nat, "tokens": int(token), "bytes": int(size)}
            for row, nat, token, size in zip(rows, parts, tokens, sizes, strict=True)
        ]
        return TaskResult(self.name, self.kind, metrics, examples)


def text_windows(
    task: DataTask, live: LiveModel, stride: int | None, length: int | None = None
) -> tuple[list[Row], list[Encoded], list[Window]]:
    """The rows that have something to predict, their tokens, and the windows to run.

    Args:
        length: tokens of a window; default the model's context.

    Raises:
        SourceError: no row has.
    """
    length = length or live.max_length
    found = [
        (row, encode(row, live.tokenizer)) for row in task.sample(read_rows(task.data), live.seed)
    ]
    kept = [(row, tokens) for row, tokens in found if tokens.first < len(tokens.ids)]
    if not kept:
        raise SourceError("has no token to score", file=str(task.data))
    items = [
        window
        for i, (_, tokens) in enumerate(kept)
        for window in windows(i, tokens.ids, tokens.first, length, stride or max(1, length // 2))
    ]
    return [row for row, _ in kept], [tokens for _, tokens in kept], items
