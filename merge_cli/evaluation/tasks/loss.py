"""The task `loss`: negative log-likelihood of held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.errors import SourceError
from merge_cli.evaluation.forward import Window, summed_losses, windows
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.rows import Row, encode, read_rows
from merge_cli.evaluation.task import DataTask, OnProgress, cut_note
from merge_cli.evaluation.tokens import Encoded, row_start
from merge_cli.recipe.sections import option


@dataclass(frozen=True, kw_only=True)
class LossTask(DataTask):
    """Negative log-likelihood of text: per token, and per byte, which compares vocabularies."""

    kind = "loss"
    metrics = ("loss", "perplexity", "bits_per_byte")
    version = 3

    stride: int | None = option(
        None,
        "tokens that count in each window of a text longer than the context; default half of it",
        least=1,
    )

    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        rows, encoded, items = text_windows(self, live, self.stride)
        tokens = [float(max(0, len(row.ids) - row.first)) for row in encoded]
        sizes = [float(_bytes(row)) for row in encoded]
        parts = summed_losses(live, items, len(rows), on_progress).tolist()
        bits = [part / math.log(2) for part in parts]
        metrics = {
            "loss": Metric("loss", "nats per token", "lower", parts, tokens),
            "perplexity": Metric("perplexity", "per token", "lower", parts, tokens, power=True),
            "bits_per_byte": Metric("bits_per_byte", "bits per byte", "lower", bits, sizes),
        }
        examples = [
            {"line": row.line, "nats": nat, "tokens": int(token), "bytes": int(size)}
            for row, nat, token, size in zip(rows, parts, tokens, sizes, strict=True)
        ]
        notes = window_notes(encoded, live.max_length)
        return TaskResult(self.name, self.kind, metrics, examples, notes=notes)

    def check_row(self, row: Row) -> None:
        row.require_text()

    def check(self, live: LiveModel) -> None:
        text_windows(self, live, self.stride)


def _bytes(row: Encoded) -> int:
    """Bytes of the predicted text: all but a first token, which nothing predicts."""
    return max(len(row.text.encode()), 1) if len(row.ids) > row.first else 0


def window_notes(encoded: Sequence[Encoded], length: int) -> tuple[str, ...]:
    """How many rows are longer than a window."""
    count = sum(len(row.ids) > length for row in encoded)
    message = "rows are: their tokens do not see all that comes before them (`stride`)"
    return cut_note(count, len(encoded), message, length)


def text_windows(
    task: DataTask, live: LiveModel, stride: int | None, length: int | None = None
) -> tuple[list[Row], list[Encoded], list[Window]]:
    """The rows, their tokens, and the windows to run.

    A row without tokens to predict has a weight of 0, so that rows of two models stay paired.

    Args:
        length: tokens of a window; default the model's context.

    Raises:
        SourceError: no row has tokens to predict, or one has a token that the model lacks.
    """
    length = length or live.max_length
    rows = task.sample(read_rows(task.data), live.seed)
    start, entries = row_start(live.tokenizer), live.entries
    encoded = [encode(row, live.tokenizer, start=start, entries=entries) for row in rows]
    items = [
        window
        for i, tokens in enumerate(encoded)
        for window in windows(i, tokens.ids, tokens.first, length, stride or max(1, length // 2))
    ]
    if not items:
        raise SourceError("has no token to score", file=str(task.data))
    return rows, encoded, items
