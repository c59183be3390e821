"""What gathering statistics costs: time against plain passes, memory against one model and sums.

    python scripts/bench_statistics.py speed     # ratios, in turns
    python scripts/bench_statistics.py memory    # peaks of processes

Speed: the same random model and examples; for `regmean` plain is the forward passes alone, for
`fisher` forward and backward of one example after another, gradients dropped. The ratio is the
median of the rounds' ratios. Memory: private pages of a process of its own, less those before the
model is loaded; the floor is the model and one sum for each weight (`fisher`), or the model and the
matrices of a round (`regmean`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_dam import SHAPES, Peak, private_bytes, seconds, write_family

from merge_cli.calibration.data import Examples, batches_of
from merge_cli.calibration.fisher import gather_importances
from merge_cli.calibration.gram import gather_grams
from merge_cli.calibration.plan import SourcePart
from merge_cli.calibration.store import Writer
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.live import LiveModel
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.statistics import Statistics
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source

GATHER = {"regmean": ("gram", gather_grams), "fisher": ("fisher", gather_importances)}


def examples_of(rows: int, length: int, vocabulary: int) -> Examples:
    chance = random.Random(0)
    items = [
        Example(array("i", (chance.randrange(1, vocabulary) for _ in range(length))), 1)
        for _ in range(rows)
    ]
    return Examples(rows, tuple(items))


def live_of(folder: Path) -> LiveModel:
    """Without a tokenizer, which the random family does not have."""
    import transformers as hf

    net = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return LiveModel(str(folder), net, None, "cpu", "float32", 2048, 8192)


def gather(
    live: LiveModel,
    source: Source,
    examples: Examples,
    method: str,
    file: Path,
    rounds: int | None = None,
) -> None:
    """The part of a gathering that runs the model, into a file that is thrown away."""
    kind, work = GATHER[method]
    dials = Statistics(rounds=rounds)
    part = SourcePart(source, "random", examples, "random", kind, dials, 0, "cpu", "float32")
    file.touch()
    writer = work(live, part, partial(Writer, file, kind), lambda done, total: None)
    writer.close()
    file.unlink()


def plain(live: LiveModel, examples: Examples, method: str) -> None:
    """The passes that cannot be saved."""
    if method == "regmean":
        for batch in batches_of(examples.items, Statistics().batch_tokens):
            with torch.no_grad():
                live.net(input_ids=torch.tensor([one.ids for one in batch]), use_cache=False)
        return
    for one in examples.items:
        ids = torch.tensor([one.ids])
        logits = live.net(input_ids=ids, use_cache=False).logits[0, :-1]
        logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().backward()
        live.net.zero_grad(set_to_none=True)


def bench_speed(shape: str, rows: int, length: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_family(folder, shape)
        live, source = live_of(folder / "a"), open_source(ModelRef("a"), folder)
        examples = examples_of(rows, length, SHAPES[shape][3])
        size = sum(p.numel() for p in live.net.parameters()) / 1e6
        print(
            f"{shape}: {size:.0f} M parameters, {rows} examples of {length} tokens, "
            f"{torch.get_num_threads()} thread(s)"
        )
        print("| method | plain tokens/s | gathering tokens/s | gathering / plain |")
        print("|---|---:|---:|---:|")
        for method in GATHER:
            live.net.requires_grad_(True)
            ours = partial(gather, live, source, examples, method, folder / "x")
            theirs = partial(plain, live, examples, method)
            print(_row(method, examples.tokens, rounds, ours, theirs), flush=True)


def _row(
    method: str, tokens: int, rounds: int, ours: Callable[[], None], theirs: Callable[[], None]
) -> str:
    theirs()
    ours()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    ratios = [mine / plain for plain, mine in pairs]
    middle = [statistics.median(pair[i] for pair in pairs) for i in (0, 1)]
    return (
        f"| {method} | {tokens / middle[0]:,.0f} | {tokens / middle[1]:,.0f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def measure_memory(folder: Path, shape: str, method: str, rows: int, length: int) -> None:
    """In a process of its own: prints what was seen as JSON."""
    from merge_cli.engine.memory import return_freed_memory

    method, _, number = method.partition("/")
    examples = examples_of(rows, length, SHAPES[shape][3])
    source = open_source(ModelRef("a"), folder)
    before = private_bytes()
    return_freed_memory()
    live = live_of(folder / "a")
    with Peak() as peak:
        gather(live, source, examples, method, folder / "x", int(number) if number else None)
    model = sum(p.nbytes for p in live.net.parameters())
    print(
        json.dumps(
            {
                "model": model,
                "sums": _sums(live, method, int(number or 1)),
                "peak": peak.bytes - before,
            }
        )
    )


def _sums(live: LiveModel, method: str, rounds: int) -> float:
    if method == "fisher":
        return sum(4 * p.numel() for p in live.net.parameters())
    config: Any = live.net.config
    widths = (config.hidden_size, config.hidden_size, config.hidden_size, config.intermediate_size)
    sums = 8 * config.num_hidden_layers * sum(width**2 for width in widths)
    return sums / rounds + 4 * max(widths) ** 2  # and a batch's product


def bench_memory(shape: str, rows: int, length: int) -> None:
    print("| method | model MB | sums | floor | peak | peak / floor |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        write_family(Path(name), shape)
        for method in ("regmean/1", "regmean/8", "fisher"):
            command = [
                sys.executable,
                __file__,
                "memory",
                "--shape",
                shape,
                "--rows",
                str(rows),
                "--length",
                str(length),
                "--in",
                name,
                "--method",
                method,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            floor = found["model"] + found["sums"]
            shown = " | ".join(
                f"{v / 1e6:,.0f}" for v in (found["model"], found["sums"], floor, found["peak"])
            )
            label = method.replace("/1", ", one round").replace("/8", ", eight rounds")
            print(f"| {label} | {shown} | {found['peak'] / floor:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "speed":
        bench_speed(given.shape or "small", given.rows, given.length, given.rounds)
    elif given.folder is None:
        bench_memory(given.shape or "large", given.rows, given.length)
    else:
        measure_memory(given.folder, given.shape, given.method, given.rows, given.length)


if __name__ == "__main__":
    main()
