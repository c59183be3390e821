"""The student's forward pass: hidden states where tokens count, then the head in chunks.

Whether the body and the output layer of a net can be taken apart is tried once, on a few tokens,
against its own logits; a net that does otherwise is run whole, which needs memory for its logits.

The output layer and the loss, a chunk of tokens at a time.

Logits in float32 for a whole batch would be the largest tensor of all. A chunk's logits are made,
its loss and gradients are taken on the spot, and they are gone: the gradients of hidden states and
of the layer's weight wait for the backward pass in their own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from merge_cli.dam.losses import DistillationLoss, TeacherTargets

CHUNK_BYTES = 1 << 26  # of float32 logits
_TEXT_SOFTCAP, _SCALE, _DIVISOR = "final_logit_softcapping", "logit_scale", "logits_scaling"


@dataclass
class LossSums:
    """Weighted sums of each loss over tokens, by data set, for the report."""

    owners: int = 1
    _sums: dict[str, Any] = field(default_factory=dict)

    def add(self, terms: dict[str, Any], targets: TeacherTargets) -> None:
        import torch

        for name, term in terms.items():
            value = term.detach() * targets.weights
            if self.owners == 1:
                total = value.sum().double()[None]
            else:
                total = torch.zeros(self.owners, dtype=value.dtype, device=value.device)
                total = total.index_add_(0, targets.owners, value).double()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def read(self) -> dict[str, float]:
        """The sums over all data sets; waits for the device, which `add` does not."""
        return {name: float(value.sum()) for name, value in self._sums.items()}

    def by_owner(self) -> list[dict[str, float]]:
        """The sums of each data set; waits, too."""
        values = {name: value.tolist() for name, value in self._sums.items()}
        return [
            {name: by_owner[i] for name, by_owner in values.items()} for i in range(self.owners)
        ]


@dataclass(frozen=True)
class HeadJob:
    """What a chunk's logits are compared with."""

    targets: TeacherTargets
    objective: DistillationLoss
    after: Callable[[Any], Any]
    sums: LossSums
    scale: float = 1.0
    chunk_bytes: int = CHUNK_BYTES


def after_head(config: Any) -> Callable[[Any], Any]:
    """What this family of models does to logits after the output layer, as far as is known.

    `Student` compares with the model's own logits before it believes this.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap, scale, divisor = (getattr(text, name, None) for name in (_TEXT_SOFTCAP, _SCALE, _DIVISOR))

    def after(logits: Any) -> Any:
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        return (logits / cap).tanh() * cap if cap is not None else logits

    return after


def head_loss(hidden: Any, head: Any, job: HeadJob) -> Any:
    """The weighted loss of n tokens, a number that can be differentiated.

    Args:
        hidden: [n, width], what the output layer gets.
        head: the output layer, a Linear.
    """
    import torch

    if not torch.is_grad_enabled():
        for start, stop in _chunks(len(hidden), head.weight.shape[0], job.chunk_bytes):
            logits = torch.nn.functional.linear(hidden[start:stop], head.weight, head.bias)
            _loss(job, logits, start, stop)
        return hidden.new_zeros(())
    return _function().apply(hidden, head.weight, head.bias, job)


def logits_loss(logits: Any, job: HeadJob) -> Any:
    """The same from logits [n, vocabulary], for a model whose output layer is not known."""
    total: Any = 0.0
    plain = HeadJob(job.targets, job.objective, lambda x: x, job.sums, job.scale, job.chunk_bytes)
    for start, stop in _chunks(len(logits), logits.shape[-1], job.chunk_bytes):
        total = total + _loss(plain, logits[start:stop], start, stop)
    return total


def _loss(job: HeadJob, logits: Any, start: int, stop: int) -> Any:
    import torch

    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    targets = job.targets.part(start, stop).to(logits.device, wide)
    terms = job.objective.terms(job.after(logits).to(wide), targets)
    job.sums.add(terms, targets)
    return job.scale * (job.objective.total(terms) * targets.weights).sum()


def _chunks(count: int, vocabulary: int, chunk_bytes: int) -> list[tuple[int, int]]:
    step = max(1, chunk_bytes // (4 * vocabulary))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


_known: list[Any] = []


def _function() -> Any:
    """The autograd function, made when torch is first needed."""
    if _known:
        return _known[0]
    import torch
    from torch.nn.functional import linear

    class ChunkedHead(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, job: HeadJob) -> Any:
            needs = ctx.needs_input_grad
            grads = [
                torch.zeros_like(tensor) if tensor is not None and need else None
                for tensor, need in zip((hidden, weight, bias), needs, strict=False)
            ]
            total = hidden.new_zeros((), dtype=torch.float64)
            for start, stop in _chunks(len(hidden), weight.shape[0], job.chunk_bytes):
                part = hidden[start:stop].detach()
                logits = linear(part, weight.detach(), bias).requires_grad_()
                with torch.enable_grad():
                    loss = _loss(job, logits, start, stop)
                (grad,) = torch.autograd.grad(loss, logits)
                total += loss.detach().double()
                if grads[0] is not None:
                    grads[0][start:stop] = grad @ weight
                if grads[1] is not None:
                    grads[1].addmm_(grad.T, part)
                if grads[2] is not None:
                    grads[2] += grad.sum(0)
            ctx.grads = grads
            return total

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (factor,) = upstream
            grads, ctx.grads = ctx.grads, None
            for grad in grads:
                if grad is not None:
                    grad.mul_(factor.to(grad.dtype))
            return (*grads, None)

    _known.append(ChunkedHead)
    return ChunkedHead


@dataclass(frozen=True)
class Batch:
    """Rows of like length, padded on the right.

    Attributes:
        ids, mask: int64 [rows, length].
        counted: bool [rows, length]: the prediction made here counts.
        targets: of all counted positions, row by row.
    """

    ids: Any
    mask: Any
    counted: Any
    targets: TeacherTargets

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int(self.mask.sum())


class Forward:
    """Losses of batches under one net.

    Attributes:
        taken_apart: whether the head runs in chunks; `note` says why not.
    """

    def __init__(self, net: Any, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.net, self._chunk_bytes = net, chunk_bytes
        self._after: Callable[[Any], Any] = after_head(net.config)
        self._head = net.get_output_embeddings()
        self._body = net.base_model if net.base_model is not net else None
        self.taken_apart = self._can_be_taken_apart()
        self.note = (
            ""
            if self.taken_apart
            else (f"{type(net).__name__} does not show its output layer: whole logits are kept")
        )

    def loss(
        self, batch: Batch, objective: DistillationLoss, sums: LossSums, scale: float = 1.0
    ) -> Any:
        """The batch's weighted loss, times `scale`; terms are added to `sums`."""
        device = self.net.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        job = HeadJob(batch.targets, objective, self._after, sums, scale, self._chunk_bytes)
        counted = batch.counted.to(device)
        if not self.taken_apart:
            logits = self.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits_loss(logits[counted], job)
        return head_loss(self._hidden(ids, mask)[counted], self._head, job)

    def _hidden(self, ids: Any, mask: Any) -> Any:
        assert self._body is not None
        result = self._body(input_ids=ids, attention_mask=mask, use_cache=False)
        return result.last_hidden_state

    def _can_be_taken_apart(self) -> bool:
        import torch

        head = self._head
        if self._body is None or not isinstance(head, torch.nn.Linear):
            return False
        device = self.net.device
        ids = torch.arange(1, 9, device=device)[None] % head.weight.shape[0]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            whole = self.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
            try:
                ours = self._after(head(self._hidden(ids, mask)))
            except (AttributeError, TypeError, RuntimeError):
                return False  # a body of another shape
        if ours.shape != whole.shape:
            return False
        error = (ours.double() - whole.double()).abs().max()
        return bool(error <= 1e-2 * whole.double().abs().max() + 1e-6)
