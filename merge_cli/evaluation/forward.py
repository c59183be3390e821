"""Running a model over rows: windows, batches, and the logits of the tokens that count.

Windows of similar length share a batch, within a budget of tokens and of logits, whose float32 copy
fills the memory with a large vocabulary. Padding is on the right: with causal attention (and with
recurrence) no token that counts sees it. All predictions are checked: token ids must have
embeddings, and logits must be finite.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.task import OnProgress

_LOGIT_BYTES = 1 << 30
# On a CPU more tokens at once only outgrow its caches, and bring more padding.
_HOST_TOKENS = 1024


@dataclass(frozen=True)
class Window:
    """A part of an example: tokens from `first` on count, the others are context."""

    example: int
    ids: Sequence[int]
    first: int


@dataclass(frozen=True)
class Scored:
    """One batch's predictions.

    Attributes:
        examples: int64 [n], which example each prediction belongs to.
        logits: float32 [n, vocabulary].
        targets: int64 [n], the next tokens.
        windows: of the batch; predictions are in their order.
    """

    examples: Any
    logits: Any
    targets: Any
    windows: Sequence[Window] = ()


def windows(
    example: int, ids: Sequence[int], first: int, length: int, stride: int
) -> Iterator[Window]:
    """Cut a row that is longer than the model's context into windows; each token counts once.

    Args:
        first: the first token that counts, at least 1.
        length: tokens of a window.
        stride: tokens that count in every window after the first; each of them sees at least
            length - stride tokens before it.
    """
    stride = min(stride, length - 1)
    while first < len(ids):
        end = min(len(ids), max(length, first + stride))
        begin = max(0, end - length)
        yield Window(example, ids[begin:end], first - begin)
        first = end


def batches(items: Sequence[Window], tokens: int, vocabulary: int) -> Iterator[list[Window]]:
    """Windows in batches of at most `tokens` with padding.

    The longest come first, so that a lack of memory shows at the start.
    """
    budget = min(tokens, _LOGIT_BYTES // (4 * vocabulary))
    for numbers in batches_by_length([len(window.ids) for window in items], budget):
        yield [items[number] for number in numbers]


def batches_by_length(
    lengths: Sequence[int], tokens: int, numbers: Iterable[int] | None = None
) -> list[list[int]]:
    """Numbers of sequences in batches of at most `tokens` with padding, the longest first.

    Args:
        lengths: of all sequences.
        numbers: of the sequences to batch; default all.
    """
    batches: list[list[int]] = []
    order = range(len(lengths)) if numbers is None else numbers
    for number in sorted(order, key=lambda i: (-lengths[i], i)):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def forward(
    live: LiveModel, windows: Sequence[Window], on_progress: OnProgress
) -> Iterator[Scored]:
    """Run every window through the model."""
    total = sum(len(window.ids) for window in windows)
    done = 0
    on_host = live.input_device == "cpu"
    tokens = min(live.batch_tokens, _HOST_TOKENS) if on_host else live.batch_tokens
    for batch in batches(windows, tokens, live.vocabulary):
        yield _scored(live, batch)
        done += sum(len(window.ids) for window in batch)
        on_progress(done, total)


def _scored(live: LiveModel, batch: Sequence[Window]) -> Scored:
    import torch

    # The last token is predicted, and is no input.
    width = len(batch[0].ids) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.zeros(len(batch), width, dtype=torch.long)
    counts = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, window in enumerate(batch):
        row, last = torch.tensor(window.ids), len(window.ids) - 1
        ids[i, :last], targets[i, :last], mask[i, :last] = row[:-1], row[1:], 1
        counts[i, window.first - 1 : last] = True
    logits = live.logits(ids, mask)
    examples = torch.tensor([window.example for window in batch])[:, None].expand(counts.shape)
    return Scored(
        examples[counts],
        logits[counts.to(logits.device)].float(),
        targets[counts].to(logits.device),
        batch,
    )


def summed_losses(
    live: LiveModel, items: Sequence[Window], count: int, on_progress: OnProgress
) -> Any:
    """The cross-entropy of every example's counting tokens, summed: float64 [count] on the CPU.

    Raises:
        NonFiniteError: the model predicts NaN or Inf.
    """
    import torch

    sums = torch.zeros(count, dtype=torch.float64)
    for batch in forward(live, items, on_progress):
        losses = torch.nn.functional.cross_entropy(batch.logits, batch.targets, reduction="none")
        require_finite(losses, live.label)
        sums += add_up(losses, batch.examples, count)
    return sums


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
    """Watch a net that other code runs: count tokens (with padding) and passes, check predictions.

    Unknown tokens and predictions that are not finite could give any score, so both are errors:

    Raises:
        SourceError: a token beyond its embeddings.
        NonFiniteError: it predicts NaN or Inf.
    """
    embeddings = live.entries

    def before(net: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = args[0] if args else keywords.get("input_ids")
        if ids is None:  # embeddings instead of ids
            return
        live.count(ids.numel(), 1)
        if ids.numel() and int(ids.max()) >= embeddings:
            number = int(ids.max())
            message = f"it is asked about token number {number}, and has {embeddings:,} embeddings"
            hint = "The tokenizer is not this model's."
            raise SourceError(message, model=live.label, hint=hint)

    def after(net: Any, args: tuple[Any, ...], output: Any) -> None:
        logits = getattr(output, "logits", None)
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
    """Refuse predictions that are not finite.

    Args:
        values: finite exactly where logits are: losses, or log-sum-exps.

    Raises:
        NonFiniteError: NaN or Inf is among them.
    """
    if not bool(values.isfinite().all()):
        message = "it predicts NaN or Inf: no score of it has a meaning"
        hint = "Try --dtype float32; if that does not help, its weights are broken."
        raise NonFiniteError(message, model=label, hint=hint)


@dataclass(frozen=True)
class Example:
    """Tokens of an example; those from `first` on count, which is never 0."""

    ids: array[int]
    first: int

    @property
    def counted(self) -> int:
        """Tokens whose prediction counts."""
        return len(self.ids) - self.first


def micro_batches(
    numbers: Sequence[int], sequences: Sequence[Example], tokens: int
) -> list[list[int]]:
    """Numbers of sequences in batches of at most `tokens` with padding, the longest first."""
    return batches_by_length([len(example.ids) for example in sequences], tokens, numbers)


def padded(examples: Sequence[Example]) -> tuple[Any, Any, Any]:
    """ids and mask, int64 [rows, length], and where a prediction counts, bool [rows, length].

    Padding is on the right. The prediction of token i is made at i - 1.
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
