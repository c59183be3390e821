"""Builds the model family in zoo/ from scratch: `python scripts/zoo/build.py --out zoo`.

    corpora    1 min    packages -> clean passages, split by document
    tokenizer <1 min    byte-level BPE of 4096 tokens
    base      20 min    Llama of 5 M parameters on mixed text
    experts   20 min    japanese, math, code, german: fine-tunes of the base
    export    <1 min    bfloat16 checkpoints, held-out text, model cards
    scores     8 min    every model on every test set

Every step keeps its result in the work folder and is skipped when it is there; a stopped
training run goes on where it was. Minutes are as measured on one core with AVX-512 bf16,
the last three on a busy machine.
"""

import argparse
import itertools
import shutil
import time
from pathlib import Path

import arithmetic
import corpora

STEPS = ("corpora", "tokenizer", "base", "experts", "export", "scores")
# How many maths problems of each split are written for training and testing.
PROBLEMS = {"train": 60_000, "val": 1_000, "test": 2_000}


def build_corpora(work: Path) -> None:
    if (work / "corpora" / "sources.json").exists():
        return
    for package in {source.package for source in corpora.SOURCES}:
        shutil.rmtree(work / "packages" / f"{package}.partial", ignore_errors=True)
    (work / "corpora").mkdir(parents=True, exist_ok=True)
    for split, count in PROBLEMS.items():
        found = itertools.islice(arithmetic.problems(split), count)
        corpora.write_rows(
            work / "corpora" / f"math.{split}.jsonl",
            [{"prompt": problem.prompt, "completion": problem.completion} for problem in found],
        )
    corpora.build(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--work", type=Path, default=Path(".cache/zoo"))
    parser.add_argument("--only", choices=STEPS, help="run just this step")
    parser.add_argument("--expert", action="append", help="of the experts, only this one")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    # Imported late, so that --help and the corpora do not wait for torch.
    import torch

    torch.set_num_threads(options.threads)
    work: Path = options.work
    for step in STEPS if options.only is None else (options.only,):
        began = time.monotonic()
        if step == "corpora":
            build_corpora(work)
        elif step == "tokenizer":
            import bpe

            if not (work / "tokenizer" / "tokenizer.json").exists():
                bpe.build(work)
        elif step == "base":
            import train

            train.train(train.BASE, work)
        elif step == "experts":
            import train

            for name in options.expert or train.EXPERTS:
                train.train(train.EXPERTS[name], work, work / "runs" / "base")
        elif step == "export":
            import export

            export.build(work, options.out)
        elif step == "scores":
            import score

            score.build(work, options.out)
        print(f"{step}: done in {(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
