"""Builds the family of `merge-cli demo`: `python scripts/demo_family/build.py`.

    data       the rows of every split
    train      base and two experts, about a minute on one core, in bfloat16
    choose     lambda of the merge, by right answers to the val rows
    scores     every model on the test rows, printed

The result is package data, merge_cli/demo/family, and is committed: sums of floating-point numbers
differ from one processor to another, and what the documentation says is about these files.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import problems
import torch
import train
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import merge_cli
from merge_cli.options import MergeOptions

FAMILY = Path(__file__).parents[2] / "merge_cli" / "demo" / "family"
LAMBDAS = [round(0.1 * step, 1) for step in range(1, 11)]
METHOD = "task_arithmetic"


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model in bfloat16, with its tokenizer."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False
    )
    stored.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), train.END)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=train.POSITIONS, **special
    ).save_pretrained(str(folder))


def recipe(scale: float) -> str:
    """The demo's recipe."""
    experts = ", ".join(problems.SUBJECTS)
    return (
        "# Two experts become one model: the change that each made to the base is added to it.\n"
        "# lambda was chosen by right answers to data/*.val.jsonl; eval.yaml asks other rows.\n"
        f"merge_method: {METHOD}\nbase_model: base\nmodels: [{experts}]\n"
        f"parameters: {{lambda: {scale}}}\ndtype: bfloat16\n"
    )


def tasks(split: str) -> str:
    """An evaluation file: right answers to the rows of a split."""
    text = f"# Right answers to the {split} rows, which no model was trained on.\ntasks:\n"
    for name in problems.SUBJECTS:
        data = f"data/{name}.{split}.jsonl"
        text += f"  - {{task: exact_match, data: {data}, max_new_tokens: 6}}\n"
    return text


def choose(out: Path) -> float:
    """The lambda whose merge has the best mean on the val rows; the smallest of equals."""
    validation = out / "val.yaml"
    validation.write_text(tasks("val"), encoding="utf-8")
    means = {}
    with TemporaryDirectory() as work:
        for scale in LAMBDAS:
            file = out / "candidate.yaml"
            file.write_text(recipe(scale), encoding="utf-8")
            options = MergeOptions(overwrite=True, statistics=False)
            merged = merge_cli.merge(file, Path(work) / "merged", options=options)
            found = merge_cli.evaluate(merged.path, validation, cache=False)
            means[scale] = sum(found[name].value for name in problems.SUBJECTS) / 2
            print(f"  lambda {scale}: {means[scale]:.3f} of the val rows right", flush=True)
            file.unlink()
    validation.unlink()
    return max(means, key=lambda scale: (means[scale], -scale))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FAMILY)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    problems.write(out / "data")
    tokenizer = train.new_tokenizer()
    print("base")
    base = train.new_model(tokenizer.get_vocab_size())
    train.train(base, train.BASE, tokenizer)
    export(base, tokenizer, out / "base")
    for name, run in train.EXPERTS.items():
        print(name)
        expert = copy.deepcopy(base)
        train.train(expert, run, tokenizer)
        export(expert, tokenizer, out / name)
    print("choose")
    scale = choose(out)
    (out / "recipe.yaml").write_text(recipe(scale), encoding="utf-8")
    (out / "eval.yaml").write_text(tasks("test"), encoding="utf-8")
    for name in ("base", *problems.SUBJECTS):
        found = merge_cli.evaluate(out / name, out / "eval.yaml", cache=False)
        print(name, {task: found[task].value for task in problems.SUBJECTS})


if __name__ == "__main__":
    main()
