"""Trains the base and its experts on packed passages, resumably, on one CPU core.

Data: each domain is one long token stream, passages separated by `<|endoftext|>`; a batch cuts
random windows out of the streams, each from a domain drawn by the run's mixture. A batch is a
pure function of (seed, step), so a resumed run sees the batches it would have seen.

Muon moves the matrices of the base and AdamW the rest; the experts are plain AdamW fine-tunes,
the usual thing to merge. The arithmetic is bf16
under autocast with float32 weights where the processor has it: about twice as fast.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bpe import END, POSITIONS, VOCABULARY
from corpora import read_rows
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PROMPT_WEIGHT = 0.2  # of a maths prompt's tokens in the loss; everything else weighs 1


@dataclass(frozen=True)
class Run:
    """One training run; `mixture` maps streams to shares of the windows."""

    name: str
    mixture: dict[str, float]
    steps: int
    seed: int
    rate: float
    warmup: int
    muon_rate: float | None = None  # None: AdamW for every tensor
    batch_tokens: int = 4096
    long_from: float = 0.0  # windows are POSITIONS long after this share of the steps, else 256

    def window(self, step: int) -> int:
        return POSITIONS if step >= self.long_from * self.steps else 256


# Measured on one core with bf16: the base 20 minutes; an expert 4 to 7, on a busy machine.
BASE = Run(
    "base",
    {"english": 0.46, "japanese": 0.14, "german": 0.12, "code": 0.18, "math": 0.10},
    steps=1200,
    seed=11,
    rate=3e-3,
    warmup=50,
    muon_rate=1.2e-2,
    long_from=0.8,
)
EXPERTS = {
    run.name: run
    for run in (
        Run("japanese", {"japanese": 0.6, "japanese-help": 0.4}, 180, 21, 6e-4, 10),
        # The task is narrow and its rows short: more steps, short windows, and some English, or
        # the model forgets everything else and no average with it is worth having.
        Run("math", {"math": 0.75, "english": 0.25}, 240, 22, 5e-4, 10, long_from=1.0),
        Run("code", {"code": 1.0}, 260, 23, 8e-4, 10),
        Run("german", {"german": 0.6, "german-help": 0.4}, 120, 24, 6e-4, 10),
    )
}


@dataclass(frozen=True)
class Stream:
    tokens: np.ndarray[Any, np.dtype[np.uint16]]  # [n]
    weights: np.ndarray[Any, np.dtype[np.float32]]  # [n], of each token as a target


def encode_row(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], int]:
    """A row's token ids and how many of them are only the prompt."""
    # Not verbose: passages longer than the positions are cut up later.
    if "text" in row:
        return tokenizer.encode(row["text"], verbose=False), 0
    prompt = tokenizer.encode(row["prompt"], verbose=False)
    return prompt + tokenizer.encode(row["completion"], verbose=False), len(prompt)


def load_stream(work: Path, name: str) -> Stream:
    """The tokens of a domain's training passages; `X-help` is the committable part of X."""
    cache = work / "tokens" / f"{name}.npz"
    if not cache.exists():
        tokenizer: Any = AutoTokenizer.from_pretrained(work / "tokenizer")
        end: int = tokenizer.convert_tokens_to_ids(END)
        domain = name.removesuffix("-help")
        tokens: list[int] = [end]
        weights: list[float] = [1.0]
        for row in read_rows(work / "corpora" / f"{domain}.train.jsonl"):
            if name != domain and not row["committed"]:
                continue
            ids, prompt = encode_row(tokenizer, row)
            tokens += [*ids, end]
            weights += [PROMPT_WEIGHT] * prompt + [1.0] * (len(ids) - prompt + 1)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, tokens=np.array(tokens, np.uint16), weights=np.array(weights, np.float32))
        partial.replace(cache)
    with np.load(cache) as arrays:
        return Stream(arrays["tokens"], arrays["weights"])


def batch(run: Run, streams: dict[str, Stream], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [windows, length + 1] and target weights [windows, length] of one step."""
    rng = np.random.default_rng((run.seed, step))
    length = run.window(step)
    names = list(run.mixture)
    shares = np.array([run.mixture[name] for name in names])
    tokens, weights = [], []
    for choice in rng.choice(len(names), run.batch_tokens // length, p=shares / shares.sum()):
        stream = streams[names[choice]]
        start = int(rng.integers(len(stream.tokens) - length - 1))
        tokens.append(stream.tokens[start : start + length + 1].astype(np.int64))
        weights.append(stream.weights[start + 1 : start + length + 1])
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(weights))


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def optimizers(run: Run, model: torch.nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    """The run's optimizers with their peak learning rates."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix and run.muon_rate else others).append(parameter)
    made: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(others, lr=run.rate, betas=(0.9, 0.95), weight_decay=0.01), run.rate)
    ]
    if run.muon_rate:
        muon = torch.optim.Muon(
            matrices,
            lr=run.muon_rate,
            weight_decay=0.01,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        made.append((muon, run.muon_rate))
    return made


def schedule(run: Run, step: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to a twentieth."""
    if step < run.warmup:
        return (step + 1) / run.warmup
    done = (step - run.warmup) / max(1, run.steps - run.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def train(
    run: Run,
    work: Path,
    start: Path | None = None,
    report: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Path:
    """Trains `run` from `start` (a fresh model if None); returns the folder of its weights.

    Saves its state every 100 steps and picks it up when called again.
    """
    out = work / "runs" / run.name
    if (out / "model.safetensors").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    streams = {name: load_stream(work, name) for name in run.mixture}
    model = LlamaForCausalLM.from_pretrained(start) if start else new_model(run.seed)
    model.train()
    made = optimizers(run, model)
    state_file = out / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file)
        first = state["step"]
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(made, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    began, smooth = time.monotonic(), 0.0
    for step in range(first, run.steps):
        for optimizer, peak in made:
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(run, step)
        loss = loss_of(model, *batch(run, streams, step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in made:
            optimizer.step()
            optimizer.zero_grad()
        value = loss.item()
        smooth = value if step == first else 0.95 * smooth + 0.05 * value
        if (step + 1) % 20 == 0 or step + 1 == run.steps:
            spent = time.monotonic() - began
            speed = (step + 1 - first) * run.batch_tokens / spent
            left = (run.steps - step - 1) * spent / (step + 1 - first)
            report(
                f"{run.name}: step {step + 1}/{run.steps}, {speed:,.0f} tokens/s, "
                f"loss {smooth:.3f}, {left / 60:.1f} min left"
            )
        if (step + 1) % 100 == 0 and step + 1 < run.steps:
            partial = state_file.with_suffix(".partial")
            torch.save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer, _ in made],
                },
                partial,
            )
            partial.replace(state_file)
    # Adam's state is bigger than the model, so only the weights stay.
    staging = out.with_name(run.name + ".partial")
    model.save_pretrained(staging)
    for file in staging.iterdir():
        file.replace(out / file.name)
    staging.rmdir()
    state_file.unlink(missing_ok=True)
    return out
