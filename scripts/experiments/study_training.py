"""What training the weights themselves comes to: the uniform soup, trained on by plain PyTorch.

Fine-tuning on the sources' text, distillation from the sources (KL over the whole vocabulary, each
source on its own text), and the same with a low-rank update of rank 8 for each linear layer. The
loss is the mean over domains. AdamW, cosine schedule, gradients clipped at 1. The weights that are
kept are those with the lowest loss on validation rows, measured at the start and at every fifth of
the steps, as DAM's are.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.parametrize
from study_families import Family
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_cli.data.sequences import sequences
from merge_cli.evaluation.forward import Example, padded
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.tokens import row_start

KINDS = ("fine-tuning", "distillation", "LoRA distillation")
# Tried on the zoo with seed 0 and the default budget; the best on validation
# rows is used everywhere.
RATES: dict[str, tuple[float, ...]] = {
    "fine-tuning": (1e-4, 3e-4, 1e-3),
    "distillation": (3e-4, 1e-3),
    "LoRA distillation": (1e-3, 3e-3, 1e-2),
}
_RANK, _ALPHA = 8, 16
_LENGTH, _EXAMPLES = 256, 2  # tokens of a sequence, sequences of each source in a step
_WARMUP, _CLIP, _MEASUREMENTS = 0.1, 1.0, 5
_VAL_TOKENS = 2048  # of each source, as DAM's


@dataclass(frozen=True)
class Trained:
    """A training's outcome; `losses` are those of all measurements on validation rows."""

    tokens: int
    cpu: float
    losses: tuple[float, ...]


Step = list[list[Example]]  # the sequences of each source


def train(
    kind: str, family: Family, soup: Path, budget: int, rate: float, seed: int, out: Path | None
) -> Trained:
    """Train the soup on about `budget` tokens of all sources together.

    Args:
        out: the folder that the best weights are written to; None only measures them.
    """
    began = time.process_time()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(soup)
    net = _load(soup)
    teachers = [] if kind == "fine-tuning" else [_load(one.folder) for one in family.sources]
    steps = _steps(family, tokenizer, budget, seed)
    held_out = [_examples(source.val, tokenizer, _VAL_TOKENS, seed) for source in family.sources]
    trained = _low_rank(net) if kind == "LoRA distillation" else list(net.parameters())
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(len(steps)))
    losses = [_measure(net, held_out)]
    best = _weights(net)
    due = {round(len(steps) * (i + 1) / _MEASUREMENTS) for i in range(_MEASUREMENTS)}
    for number, step in enumerate(steps, 1):
        for i, examples in enumerate(step):
            # One backward a source: gradients add up to that of the mean over domains.
            loss = _loss(net, teachers[i] if teachers else None, examples) / len(step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number in due:
            losses.append(_measure(net, held_out))
            if losses[-1] == min(losses):
                best = _weights(net)
    if out is not None:
        _write(best, soup, out)
    tokens = sum(len(item.ids) for step in steps for examples in step for item in examples)
    return Trained(tokens, time.process_time() - began, tuple(losses))


def _load(folder: Path) -> Any:
    # The merges that a training competes with run in evaluation mode, too: there is no dropout.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _steps(family: Family, tokenizer: Any, budget: int, seed: int) -> list[Step]:
    """Sequences in an order that the seed decides, until the budget is reached."""
    streams = [_endless(source.train, tokenizer, seed) for source in family.sources]
    steps: list[Step] = []
    total = 0
    while total < budget:
        steps.append([[next(stream) for _ in range(_EXAMPLES)] for stream in streams])
        total += sum(len(item.ids) for examples in steps[-1] for item in examples)
    return steps


def _endless(file: Path, tokenizer: Any, seed: int) -> Iterator[Example]:
    """All sequences of a file in random order, again and again."""
    chance = random.Random(seed)
    rows = read_rows(file)
    while True:
        chance.shuffle(rows)
        for row in rows:
            yield from sequences([row], tokenizer, _LENGTH, None, start=row_start(tokenizer))


def _examples(file: Path, tokenizer: Any, tokens: int, seed: int) -> list[Example]:
    """Random rows of about so many tokens."""
    rows = read_rows(file)
    random.Random(seed).shuffle(rows)
    chosen: list[Example] = []
    for row in rows:
        if sum(len(item.ids) for item in chosen) >= tokens:
            break
        chosen += sequences([row], tokenizer, _LENGTH, None, start=row_start(tokenizer))
    return chosen


def _cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(_WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _predicted(net: Any, examples: Sequence[Example]) -> tuple[Any, Any]:
    """Logits [tokens, vocabulary] and labels [tokens] of the predictions that count."""
    ids, mask, counted = padded(examples)
    logits = net(input_ids=ids, attention_mask=mask, use_cache=False).logits[counted].float()
    labels = torch.cat([torch.tensor(item.ids[item.first :]) for item in examples]).long()
    return logits, labels


def _loss(net: Any, teacher: Any, examples: Sequence[Example]) -> Any:
    """Cross-entropy with the text, or KL(teacher ‖ net), the mean over tokens."""
    logits, labels = _predicted(net, examples)
    if teacher is None:
        return torch.nn.functional.cross_entropy(logits, labels)
    with torch.no_grad():
        wanted, _ = _predicted(teacher, examples)
    return torch.nn.functional.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
    )


@torch.no_grad()
def _measure(net: Any, held_out: Sequence[Sequence[Example]]) -> float:
    """The loss with the text, the mean over domains."""
    means = []
    for examples in held_out:
        total, count = 0.0, 0
        for i in range(0, len(examples), 8):
            logits, labels = _predicted(net, examples[i : i + 8])
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        means.append(total / count)
    return sum(means) / len(means)


class _LowRank(torch.nn.Module):
    """W + (alpha / rank) B A; B begins at zero."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.empty(_RANK, columns))
        self.b = torch.nn.Parameter(torch.zeros(rows, _RANK))
        torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Any) -> Any:
        return weight + _ALPHA / _RANK * (self.b @ self.a)


def _low_rank(net: Any) -> list[Any]:
    """Freeze a net; give every linear layer but the head an update, whose parameters come back."""
    net.requires_grad_(False)
    updates = []
    head = net.get_output_embeddings()
    for module in net.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            updates.append(_LowRank(*module.weight.shape))
            torch.nn.utils.parametrize.register_parametrization(module, "weight", updates[-1])
    return [parameter for update in updates for parameter in update.parameters()]


@torch.no_grad()
def _weights(net: Any) -> dict[str, Any]:
    """A copy of the weights, with low-rank updates added."""
    copies = {}
    for name, module in net.named_modules():
        if "parametrizations" in name:
            continue
        kept = [key for key, _ in module.named_parameters(recurse=False)]
        if torch.nn.utils.parametrize.is_parametrized(module):
            kept.append("weight")
        copies |= {f"{name}.{key}": getattr(module, key).detach().clone() for key in kept}
    return copies


def _write(weights: dict[str, Any], soup: Path, out: Path) -> None:
    """A checkpoint like the soup, with other weights; a tied head is not listed twice."""
    net = _load(soup)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if net.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"weights do not fit: {missing} are missing, {unexpected} are unknown")
    net.save_pretrained(out)
    AutoTokenizer.from_pretrained(soup).save_pretrained(out)
