"""The student's forward pass: hidden states where tokens count, then the head in chunks.

Whether the body and the output layer of a net can be taken apart is tried once, on a few tokens,
against its own logits; a net that does otherwise is run whole, which needs memory for its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merge_cli.dam.head import CHUNK_BYTES, HeadJob, LossSums, after_head, head_loss, logits_loss
from merge_cli.dam.losses import DistillationLoss, TeacherTargets


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
        found = self._body(input_ids=ids, attention_mask=mask, use_cache=False)
        return found.last_hidden_state

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
