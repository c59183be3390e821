"""Held-out loss against a naive loop over the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import merge_cli
from merge_cli.errors import SourceError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    entries = [
        {"text": "def add(a, b):\n    return a + b\n"},
        {"text": "日本語の文章です。" * 20},
        {"prompt": "Tom has 3 apples and buys 4. ", "completion": "3 + 4 = 7. Answer: 7"},
        {"text": "A"},
    ]
    path.write_text("\n".join(json.dumps(e) for e in entries) + "\n\n", encoding="utf-8")
    return path


def naive(model: Path, rows: Path) -> tuple[float, int]:
    """One row at a time, one token at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    for line in filter(str.strip, rows.read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        text = row.get("completion") or row["text"]
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        before = start + tokenizer.encode(row.get("prompt", ""), add_special_tokens=False)
        ids = before + tokenizer.encode(text, add_special_tokens=False)
        ids = ids[: net.config.max_position_embeddings]
        with torch.inference_mode():
            logits = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for i in range(max(1, len(before)), len(ids)):
            nats -= float(logits[i - 1, ids[i]])
            tokens += 1
    return nats, tokens


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_loss_is_the_naive_one(zoo: Path, rows: Path) -> None:
    nats, tokens = naive(zoo / "base", rows)
    found = merge_cli.evaluate(zoo / "base", rows)["rows"]
    loss, bits = found["loss"], found["bits_per_byte"]
    assert sum(loss.weights) == tokens
    assert sum(loss.parts) == pytest.approx(nats, rel=1e-5)
    assert found.value == pytest.approx(nats / tokens, rel=1e-5)
    assert bits.value == pytest.approx(nats / math.log(2) / sum(bits.weights), rel=1e-5)


@pytest.mark.parametrize("line", ["{", '{"txt": 1}', "[1]"])
def test_malformed_rows_are_named(zoo: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine text"}}\n{line}\n')
    with pytest.raises(SourceError, match="line 2"):
        merge_cli.evaluate(zoo / "base", path)
