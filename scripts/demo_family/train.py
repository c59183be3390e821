"""Trains the demo's family: a base that has begun both subjects, and an expert in each.

The base reads English number words and has seen a few German and French ones. The experts go on
from it, each with one language, gently: a small step from the base is what merges well.

The loss is on the answer and on the end of text that follows it. A batch is a function of the run's
seed and the step.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import torch
from problems import LANGUAGES, SUBJECTS, Row, rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
POSITIONS = 128
WIDTH = 24  # tokens of the longest row


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        mixture: languages -> their shares of a batch.
        few: languages of which only so many rows are seen.
    """

    mixture: dict[str, float]
    steps: int
    rate: float
    seed: int
    few: dict[str, int]
    batch: int = 128
    warmup: int = 30


FEW = {"german": 50, "french": 25}
BASE = Run({"english": 0.6, "german": 0.2, "french": 0.2}, 400, 2e-3, 1, FEW)
EXPERTS = {
    "german": Run({"german": 1.0}, 100, 3e-4, 2, {}),
    "french": Run({"french": 1.0}, 100, 3e-4, 3, {}),
}


def new_tokenizer() -> Tokenizer:
    """Byte-level BPE of 400 tokens; digits stay apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] for name in LANGUAGES for row in rows(name, "train")]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encoded(data: list[Row], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, WIDTH] and, as labels, those of the answers; -100 elsewhere."""
    ids = torch.full((len(data), WIDTH), 0)
    labels = torch.full((len(data), WIDTH), -100)
    for i, row in enumerate(data):
        prompt = [0, *tokenizer.encode(row["prompt"]).ids]
        answer = [*tokenizer.encode(row["completion"]).ids, 0]
        both = prompt + answer
        ids[i, : len(both)] = torch.tensor(both)
        labels[i, len(prompt) : len(both)] = torch.tensor(answer)
    return ids, labels


def train(model: LlamaForCausalLM, run: Run, tokenizer: Tokenizer) -> None:
    """Train a model in place."""
    data = {}
    for name in run.mixture:
        data[name] = encoded(rows(name, "train")[: run.few.get(name)], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.01)
    draw = random.Random(run.seed)
    model.train()
    started = time.process_time()
    for step in range(run.steps):
        share_done = step / run.steps
        warm = min(1.0, (step + 1) / run.warmup)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * warm * 0.5 * (1 + math.cos(math.pi * share_done))
        parts = []
        for name, share in run.mixture.items():
            ids, labels = data[name]
            chosen = draw.choices(range(len(ids)), k=round(run.batch * share))
            parts.append((ids[chosen], labels[chosen]))
        ids = torch.cat([part[0] for part in parts])
        labels = torch.cat([part[1] for part in parts])
        logits = model(input_ids=ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step + 1 == run.steps:
            seconds = time.process_time() - started
            print(f"  {step:5d}  loss {loss.item():.4f}  {seconds:.0f} CPU s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, data: list[Row], tokenizer: Tokenizer) -> float:
    """Share of answers whose every token is the likeliest one, as greedy decoding has them."""
    ids, labels = encoded(data, tokenizer)
    likeliest = model(input_ids=ids).logits[:, :-1].argmax(-1)
    right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)
    return right.all(1).float().mean().item()


def scores(model: LlamaForCausalLM, tokenizer: Tokenizer, split: str = "val") -> dict[str, float]:
    """Accuracy by subject."""
    return {name: accuracy(model, rows(name, split), tokenizer) for name in SUBJECTS}
