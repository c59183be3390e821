"""Held-out loss: what a model pays for text that it has not seen.

Rows are JSON lines: {"text"} scores every token after the first, {"prompt", "completion"} only the
completion's. The loss is summed over tokens before it is divided, so that it does not depend on
batches; per byte of text it can be compared between vocabularies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import SourceError

_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihood.

    Attributes:
        nats: the sum over scored tokens.
        tokens, text_bytes: how many were scored.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of scored text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.text_bytes


def evaluate(
    model: str | Path, data: str | Path, *, device: str = "cpu", max_length: int | None = None
) -> Loss:
    """The loss of a model folder on a JSONL file, computed in float32.

    Args:
        max_length: tokens of a row that are used; default the model's context.

    Raises:
        SourceError: a row that is not as described, with file and line.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    net = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    net.eval().to(device)
    limit = max_length or int(getattr(net.config, "max_position_embeddings", 2048))
    rows = sorted(_encode(Path(data), tokenizer, limit), key=lambda row: len(row.ids))
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in _batches(rows):
        width = max(len(row.ids) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        scored = torch.zeros(len(batch), width, dtype=torch.bool)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            mask[i, : len(row.ids)] = 1
            scored[i, row.first : len(row.ids)] = True
        ids, scored, mask = ids.to(device), scored.to(device), mask.to(device)
        with torch.inference_mode():
            logits = net(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
        kept = scored[:, 1:]
        nats += float(losses[kept].double().sum())
        tokens += int(kept.sum())
        text_bytes += sum(row.text_bytes for row in batch)
    if not tokens:
        raise SourceError("has no token to score", file=str(data))
    return Loss(nats, tokens, text_bytes)


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    first: int  # the first scored token; at least 1, since nothing predicts the first
    text_bytes: int


def _encode(data: Path, tokenizer: Any, limit: int) -> Iterator[_Row]:
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    with data.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                prompt, text = entry.get("prompt", ""), entry.get("completion") or entry["text"]
            except (ValueError, KeyError, AttributeError) as error:
                what = f"line {number} is not a row of text or of prompt and completion: {error!r}"
                raise SourceError(what, file=str(data)) from None
            before = start + _ids(tokenizer, prompt)
            ids = (before + _ids(tokenizer, text))[:limit]
            first = max(1, len(before))
            if first < len(ids):
                scored = tokenizer.decode(ids[first:])
                yield _Row(ids, first, len(scored.encode()))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _batches(rows: list[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:  # shortest first, so the row at hand is the batch's width
        if batch and len(row.ids) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
