"""Experts for the experiments: fine-tunes of zoo/base, by seed and number of steps, made once each.

Text: the training rows of zoo/data (a quarter of a megabyte for each domain), and generated maths.
They are trained by the zoo's own loop (scripts/zoo/train.py) and kept in .cache/experiments.

    python scripts/experiments/family.py --seeds 0 1 2      trains all of them beforehand
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "zoo"))
WORK = ROOT / ".cache" / "experiments"
BASE = ROOT / "zoo" / "base"
DATA = ROOT / "zoo" / "data"

STEPS = (12, 25, 50, 100)  # of 1,024 tokens
USUAL = 100
_PROBLEMS = 20_000
# What each expert reads. The two maths experts differ in problems, in mixture and in rate.
MIXTURES: dict[str, dict[str, float]] = {
    "japanese": {"japanese": 1.0},
    "english": {"english": 1.0},
    "german": {"german": 1.0},
    "math": {"math": 0.75, "english": 0.25},
    "math-b": {"math-b": 1.0},
}
_RATES = {"math": 5e-4, "math-b": 1e-3}


@dataclass(frozen=True)
class Expert:
    """One fine-tune."""

    domain: str
    seed: int
    steps: int = USUAL

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.steps}-seed{self.seed}"


def model(expert: Expert) -> Path:
    """The expert's folder, named by its domain so that tasks find it; trained if it is missing."""
    folder = WORK / "experts" / expert.name / expert.domain
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    import train
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _prepare()
    run = train.Run(
        expert.name,
        MIXTURES[expert.domain],
        steps=expert.steps,
        seed=1000 * expert.seed + list(MIXTURES).index(expert.domain),
        rate=_RATES.get(expert.domain, 6e-4),
        warmup=max(2, min(10, expert.steps // 5)),
        batch_tokens=1024,
        long_from=1.0,
    )
    weights = train.train(run, WORK, WORK / "runs" / "base")
    staging = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    net: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    net.save_pretrained(staging)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(staging)
    staging.rename(folder)
    shutil.rmtree(weights)
    return folder


def _prepare() -> None:
    """Base in float32, tokenizer and text where the training loop looks for them."""
    if (WORK / "ready").exists():
        return
    import arithmetic
    import torch
    from corpora import write_rows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (WORK / "corpora").mkdir(parents=True, exist_ok=True)
    for domain in ("english", "japanese", "german"):
        source = DATA / f"{domain}.train.jsonl"
        shutil.copyfile(source, WORK / "corpora" / f"{domain}.train.jsonl")
    problems = itertools.islice(arithmetic.problems("train"), 2 * _PROBLEMS)
    rows = [{"prompt": one.prompt, "completion": one.completion} for one in problems]
    write_rows(WORK / "corpora" / "math.train.jsonl", rows[::2])
    write_rows(WORK / "corpora" / "math-b.train.jsonl", rows[1::2])
    AutoTokenizer.from_pretrained(BASE).save_pretrained(WORK / "tokenizer")
    base: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    base.save_pretrained(WORK / "runs" / "base")
    (WORK / "ready").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for domain in MIXTURES:
            wanted = STEPS if domain in ("japanese", "math", "german") else (USUAL,)
            for steps in wanted:
                model(Expert(domain, seed, steps))


if __name__ == "__main__":
    main()
