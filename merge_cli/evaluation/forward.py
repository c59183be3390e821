"""Rows through a model: windows, batches, logits where they count.

Windows of like length go together within a budget of tokens, and of logits, whose float32 copy is
what fills the memory with a large vocabulary. Padding is on the right: with causal attention (and
with recurrence) nothing that counts sees it.

What must hold of every prediction, whoever asks for it: known tokens in, finite numbers out.

Token sequences of which a part counts, and the batches that they go through a model in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.task import Tell

_LOGIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Window:
    """A piece of an example: tokens `first` onwards count, those before are context."""

    example: int
    ids: Sequence[int]
    first: int


@dataclass(frozen=True)
class Scored:
    """One batch's predictions.

    Attributes:
        examples: int64 [n], which example each prediction belongs to.
        logits: float32 [n, vocabulary].
        targets: int64 [n], what came next.
        windows: those of the batch; predictions follow their order.
    """

    examples: Any
    logits: Any
    targets: Any
    windows: Sequence[Window] = ()


def windows(
    example: int, ids: Sequence[int], first: int, length: int, stride: int
) -> Iterator[Window]:
    """Cut a row that is longer than the model's context: each token counts once.

    Args:
        first: the first token that counts, at least 1.
        length: tokens of a window.
        stride: tokens that count in every window after the first, so that each of them sees at
            least length - stride before it.
    """
    stride = min(stride, length - 1)
    while first < len(ids):
        end = min(len(ids), max(length, first + stride))
        begin = max(0, end - length)
        yield Window(example, ids[begin:end], first - begin)
        first = end


def batches(items: Sequence[Window], tokens: int, vocabulary: int) -> Iterator[list[Window]]:
    """Windows in batches of at most `tokens` with padding, the longest first.

    The longest first, because memory that does not suffice is better noticed at the start.
    """
    budget = min(tokens, _LOGIT_BYTES // (4 * vocabulary))
    batch: list[Window] = []
    for item in sorted(items, key=lambda item: -len(item.ids)):
        if batch and len(batch[0].ids) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def forward(live: LiveModel, items: Sequence[Window], tell: Tell) -> Iterator[Scored]:
    """Every window through the model."""
    total = sum(len(item.ids) for item in items)
    done = 0
    for batch in batches(items, live.batch_tokens, live.vocabulary):
        yield _scored(live, batch)
        done += sum(len(item.ids) for item in batch)
        tell(done, total)


def _scored(live: LiveModel, batch: Sequence[Window]) -> Scored:
    import torch

    # Nothing follows the last token: it is predicted, and not fed.
    width = len(batch[0].ids) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.zeros(len(batch), width, dtype=torch.long)
    counts = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, item in enumerate(batch):
        row, last = torch.tensor(item.ids), len(item.ids) - 1
        ids[i, :last], targets[i, :last], mask[i, :last] = row[:-1], row[1:], 1
        counts[i, item.first - 1 : last] = True
    logits = live.logits(ids, mask)
    examples = torch.tensor([item.example for item in batch])[:, None].expand(counts.shape)
    return Scored(
        examples[counts],
        logits[counts.to(logits.device)].float(),
        targets[counts].to(logits.device),
        batch,
    )


def add_up(values: Any, examples: Any, count: int) -> Any:
    """Sums by example, in float64.

    Args:
        values: [n] on any device.
        examples: int64 [n] on the CPU.

    Returns:
        float64 [count] on the CPU.
    """
    import torch

    sums = torch.zeros(count, dtype=torch.float64)
    return sums.index_add_(0, examples, values.double().cpu())


@contextmanager
def watched(live: LiveModel) -> Iterator[None]:
    """Watch what others do with the net: count its tokens (padding included) and its passes.

    What they make of tokens that it does not have, or of predictions that are no numbers, may be
    any score at all. So both are errors here:

    Raises:
        SourceError: a token beyond its embeddings.
        NonFiniteError: it predicts NaN or Inf.
    """
    entries = live.entries

    def before(net: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = args[0] if args else named.get("input_ids")
        if ids is None:  # embeddings, which have no number
            return
        live.count(ids.numel(), 1)
        if ids.numel() and int(ids.max()) >= entries:
            message = (
                f"the token number {int(ids.max())} is asked for, and it has {entries:,} embeddings"
            )
            hint = "The tokenizer is not this model's."
            raise SourceError(message, model=live.label, hint=hint)

    def after(net: Any, args: tuple[Any, ...], found: Any) -> None:
        logits = getattr(found, "logits", None)
        if logits is not None:
            require_finite(logits.float().logsumexp(-1), live.label)

    hooks = [
        live.net.register_forward_pre_hook(before, with_kwargs=True),
        live.net.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_finite(values: Any, label: str) -> None:
    """Refuse predictions that are no numbers, whatever a score would make of them.

    Args:
        values: a tensor that is finite where logits are: losses, or their log-sum-exp.

    Raises:
        NonFiniteError: NaN or Inf is among them.
    """
    if not bool(values.isfinite().all()):
        message = "it predicts NaN or Inf: no score of it means anything"
        hint = "Try --dtype float32; if that does not help, its weights are broken."
        raise NonFiniteError(message, model=label, hint=hint)


@dataclass(frozen=True)
class Example:
    """Tokens of an example; `first` is the first that counts, never 0."""

    ids: array[int]
    first: int

    @property
    def counted(self) -> int:
        """Tokens whose prediction counts."""
        return len(self.ids) - self.first


def micro_batches(
    numbers: Sequence[int], sequences: Sequence[Example], tokens: int
) -> list[list[int]]:
    """Numbers of sequences in groups of at most `tokens` with padding, the longest first."""
    result: list[list[int]] = []
    for number in sorted(numbers, key=lambda i: (-len(sequences[i].ids), i)):
        width = len(sequences[result[-1][0]].ids) if result else 0
        if not result or width * (len(result[-1]) + 1) > tokens:
            result.append([])
        result[-1].append(number)
    return result


def padded(examples: Sequence[Example]) -> tuple[Any, Any, Any]:
    """ids and mask, int64 [rows, length], and where a prediction counts, bool [rows, length].

    Padding is on the right: with causal attention nothing that counts sees it. The prediction of
    token i is made at i - 1.
    """
    import torch

    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    counted = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, item in enumerate(examples):
        ids[i, : len(item.ids)] = torch.tensor(item.ids)
        mask[i, : len(item.ids)] = 1
        counted[i, item.first - 1 : len(item.ids) - 1] = True
    return ids, mask, counted
