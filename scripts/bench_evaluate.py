"""Evaluation's tokens per second against plain transformers with the batch size that suits it best.

    python scripts/bench_evaluate.py                          # zoo/code on its own test rows
    python scripts/bench_evaluate.py --model MODEL --data FILE.jsonl [--rows 64] [--answers 16]

Plain is written by hand: rows in the file's order, so many to a batch, padded by the tokenizer,
logits of all tokens, cross-entropy of those that count; or `generate` on prompts, greedy.
Both use one loaded model, one thread and float32, and tokenise the rows anew. They take turns; the
ratio is the median of the rounds', least and largest in brackets. Tokens are the rows' own, without
padding, and seconds are CPU seconds. Losses have to agree to five digits, answers to the letter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from merge_cli.evaluation.live import LiveModel, load
from merge_cli.evaluation.run import score_task
from merge_cli.evaluation.tasks.exact_match import ExactMatch
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.recipe.reference import parse_reference
from merge_cli.sources.opening import open_source

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "zoo" / "code")
    parser.add_argument("--data", type=Path, default=ROOT / "zoo" / "data" / "code.test.jsonl")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--answers", type=int, default=0, help="generate so many tokens instead")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(parse_reference(str(given.model), ROOT), ROOT)
    live = load(source, device="cpu", dtype="float32")
    lines = [line for line in given.data.read_text(encoding="utf-8").split("\n") if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        if given.answers:
            compare_answers(live, lines[: given.rows], data, given.answers, given.rounds)
        else:
            compare_losses(live, lines[: given.rows], data, given.rounds)


def compare_losses(live: LiveModel, lines: Sequence[str], data: Path, rounds: int) -> None:
    texts = [text_of(json.loads(line)) for line in lines]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = LossTask(name="loss", data=data)
    result = score_task(task, live)
    tokens = live.cost.tokens

    def plain(size: int) -> float:
        return sum(loss for loss in plain_losses(live, texts, size))

    total = sum(result.metrics["loss"].parts)
    assert abs(plain(8) / total - 1) < 1e-5, (plain(8), total)
    report("loss", tokens, lambda: score_task(task, live), plain, rounds)


def text_of(row: dict[str, Any]) -> str:
    return str(row.get("text") or row.get("prompt", "") + row.get("completion", ""))


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def plain_losses(live: LiveModel, texts: Sequence[str], size: int) -> Iterator[float]:
    tokenizer = with_padding(live, "right")
    for batch in batched(texts, size):
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = [start + i for i in tokenizer(list(batch), add_special_tokens=False)["input_ids"]]
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.inference_mode():
            logits = live.net(**padded, use_cache=False).logits
            targets = padded["input_ids"][:, 1:].masked_fill(
                padded["attention_mask"][:, 1:] == 0, -100
            )
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), targets, reduction="none"
            )
        yield float(losses.double().sum())


def with_padding(live: LiveModel, side: str) -> Any:
    tokenizer = live.tokenizer
    tokenizer.padding_side = side
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def compare_answers(
    live: LiveModel, lines: Sequence[str], data: Path, length: int, rounds: int
) -> None:
    prompts = [str(json.loads(line)["prompt"]) for line in lines]
    data.write_text("".join(json.dumps({"prompt": p, "answer": "-"}) + "\n" for p in prompts))
    task = ExactMatch(name="answers", data=data, max_new_tokens=length)
    result = score_task(task, live)
    written = [str(example["text"]) for example in result.examples]

    def plain(size: int) -> list[str]:
        return list(itertools.chain(*plain_answers(live, prompts, size, length)))

    assert plain(8) == written
    tokens = sum(len(live.tokenizer(text)["input_ids"]) for text in [*prompts, *written])
    report(f"answers of {length} tokens", tokens, lambda: score_task(task, live), plain, rounds)


def plain_answers(
    live: LiveModel, prompts: Sequence[str], size: int, length: int
) -> Iterator[list[str]]:
    tokenizer = with_padding(live, "left")
    for batch in batched(prompts, size):
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = [start + i for i in tokenizer(list(batch), add_special_tokens=False)["input_ids"]]
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.inference_mode():
            out = live.net.generate(
                **padded, max_new_tokens=length, do_sample=False, pad_token_id=0
            )
        yield tokenizer.batch_decode(
            out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True
        )


def report(
    title: str,
    tokens: int,
    ours: Callable[[], Any],
    plain: Callable[[int], Any],
    rounds: int,
) -> None:
    """Measure ours and plain in turns, and print the table of one model."""
    runs: dict[int, list[float]] = {size: [] for size in (0, *BATCHES)}
    for _ in range(rounds):
        for size, seconds in runs.items():
            began = time.process_time()
            ours() if size == 0 else plain(size)
            seconds.append(time.process_time() - began)
    best = min(BATCHES, key=lambda size: median(runs[size]))
    print(f"| {title}, {tokens} tokens | tokens/s | of plain with {best} |\n|---|---:|---:|")
    for size, seconds in runs.items():
        ratios = [b / a for a, b in zip(seconds, runs[best], strict=True)]
        label = f"plain, {size} rows to a batch" if size else "merge-cli"
        print(
            f"| {label} | {tokens / median(seconds):,.0f} "
            f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
