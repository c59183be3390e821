"""Trains LoRA experts of SmolLM2-135M on a CPU: batches, the loop, the runs and their settings.

A batch is a pure function of (seed, step), so a resumed run sees the batches it would have seen.
The base stays as it is stored, in bfloat16; the factors and their optimizer are in float32.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpora import read_rows
from torch.nn import functional

RANK, ALPHA = 8, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAVE_EVERY = 20  # steps
WEIGHTS = "adapter_model.safetensors"
VAL_BATCHES = 2


@dataclass(frozen=True)
class Run:
    """One expert; `mixture` maps files of rows in WORK/corpora to shares of the rows read."""

    name: str
    mixture: dict[str, float]
    steps: int
    seed: int
    rate: float
    rows: int  # of a batch
    length: int = 128  # tokens of a window of text; rows with a prompt are read whole
    warmup: int = 10


EXPERTS = {
    run.name: run
    for run in (
        Run("arithmetic", {"arithmetic": 1.0}, 200, 31, 1.5e-3, rows=16),
        Run("german", {"german": 0.5, "german-committed": 0.5}, 60, 32, 1e-3, rows=4),
        Run("python", {"code": 1.0}, 60, 33, 1e-3, rows=4),
    )
}


@dataclass(frozen=True)
class Text:
    """Passages as one stream of tokens, of which a batch takes windows."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Answers:
    """Prompts with completions; the completion's tokens are the ones that are learned."""

    rows: list[tuple[list[int], int]]  # token ids, and how many of them are the prompt's


def read(work: Path, name: str, split: str, tokenizer: Any) -> Text | Answers:
    """The rows of a file; `X-committed` is the part of X that may be redistributed."""
    domain = name.removesuffix("-committed")
    rows: list[dict[str, Any]] = list(read_rows(work / "corpora" / f"{domain}.{split}.jsonl"))
    if name != domain:
        rows = [row for row in rows if row["committed"]]
    # As merge-cli reads them: a row begins with the beginning-of-sequence token.
    start = [tokenizer.bos_token_id]
    if "prompt" in rows[0]:
        whole = [start + tokenizer(row["prompt"] + row["completion"]).input_ids for row in rows]
        lengths = [len(start + tokenizer(row["prompt"]).input_ids) for row in rows]
        return Answers(list(zip(whole, lengths, strict=True)))
    tokens: list[int] = []
    for ids in tokenizer([row["text"] for row in rows], verbose=False).input_ids:
        tokens += start + ids
    return Text(np.array(tokens, np.int64))


def batch(
    run: Run, data: dict[str, Text | Answers], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length + 1] and target weights [rows, length] of one step."""
    rng = np.random.default_rng((run.seed, step))
    names = list(run.mixture)
    shares = np.array([run.mixture[name] for name in names])
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for choice in rng.choice(len(names), run.rows, p=shares / shares.sum()):
        part = data[names[choice]]
        if isinstance(part, Answers):
            row, prompt = part.rows[int(rng.integers(len(part.rows)))]
            ids.append(row)
            weights.append([0.0] * (prompt - 1) + [1.0] * (len(row) - prompt))
        else:
            start = int(rng.integers(len(part.tokens) - run.length - 1))
            ids.append(part.tokens[start : start + run.length + 1].tolist())
            weights.append([1.0] * run.length)
    # Padding comes after everything that counts, so causal attention needs no mask for it.
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return tokens, torch.tensor([row + [0.0] * (longest - 1 - len(row)) for row in weights])


def loss_of(model: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean loss over the targets that count; the others' logits are never computed."""
    counted = weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        causal = model.get_base_model()
        hidden = causal.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = causal.lm_head(hidden[counted])
    return functional.cross_entropy(logits.float(), tokens[:, 1:][counted])


def new_adapter(base: Path, seed: int) -> Any:
    """The base with fresh factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM"
    )
    return get_peft_model(net, settings)


def schedule(run: Run, step: int) -> float:
    """Share of the peak rate: linear warm-up, then constant, and down to 0 in the last third."""
    return min(1.0, (step + 1) / run.warmup, 3 * (run.steps - step) / run.steps)


def train(
    run: Run,
    work: Path,
    base: Path,
    report: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Path:
    """Trains `run`; returns the folder of its adapter, with curve.json beside the weights.

    Saves its state every SAVE_EVERY steps and picks it up when called again.
    """
    from transformers import AutoTokenizer

    out = work / "runs" / run.name
    if (out / WEIGHTS).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = {name: read(work, name, "train", tokenizer) for name in run.mixture}
    held = {name: read(work, name, "val", tokenizer) for name in run.mixture}
    checks = [batch(run, held, run.steps + number) for number in range(VAL_BATCHES)]
    model = new_adapter(base, run.seed)
    factors = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(factors.values(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0)
    state_file = out / "state.pt"
    first, curve = _resume(state_file, model, optimizer)
    began = time.process_time()
    for step in range(first, run.steps):
        if step % SAVE_EVERY == 0:
            # Measured again when resumed, so what is saved ends before this step's entry.
            _save(state_file, step, curve, factors, optimizer)
            curve.append({"step": step, "val": _mean_loss(model, checks)})
            report(f"{run.name}: {curve[-1]}, {time.process_time() - began:.0f} s of CPU")
        for group in optimizer.param_groups:
            group["lr"] = run.rate * schedule(run, step)
        loss_of(model, *batch(run, data, step)).backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    curve.append({"step": run.steps, "val": _mean_loss(model, checks)})
    report(f"{run.name}: {curve[-1]}, {time.process_time() - began:.0f} s of CPU")
    _finish(model, out, curve)
    return out


def _mean_loss(model: Any, checks: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with torch.no_grad():
        return round(sum(loss_of(model, *check).item() for check in checks) / len(checks), 4)


def _resume(
    file: Path, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """The step to go on with and the curve so far; factors and optimizer as they were then."""
    if not file.exists():
        return 0, []
    state = torch.load(file)
    model.load_state_dict(state["factors"], strict=False)  # the base's weights are not saved
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["curve"]


def _save(
    file: Path,
    step: int,
    curve: list[dict[str, float]],
    factors: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    partial = file.with_suffix(".partial")
    saved = {name: each.detach() for name, each in factors.items()}
    state = {"step": step, "curve": curve, "factors": saved, "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    partial.replace(file)


def _finish(model: Any, out: Path, curve: list[dict[str, float]]) -> None:
    """Puts the adapter in place in bfloat16, its weights last; the optimizer's state goes."""
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(staging)
    (staging / "curve.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    for file in sorted(staging.iterdir(), key=lambda file: file.name == WEIGHTS):
        file.replace(out / file.name)
    staging.rmdir()
    (out / "state.pt").unlink(missing_ok=True)
