"""What a GGUF file becomes, against transformers' own reader: tensors, tokens, time and memory.

    python scripts/measure_gguf.py FILE.gguf [--prompt TEXT]

Needs gguf and accelerate. Converts to float32 in a temporary folder, in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as hf

TEXT = "The quick brown fox, 1234567 times:\n\tdon't stop! Straße, 日本語 😀"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", default="What is the capital of France?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "merge_cli", "convert", str(arguments.file), str(out)]
        subprocess.run([*command, "--dtype", "float32"], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"convert: {used.ru_utime + used.ru_stime:.1f} s CPU, {used.ru_maxrss / 1024:.0f} MB")
        compare(arguments.file, out, arguments.prompt)


def compare(file: Path, out: Path, prompt: str) -> None:
    """Print what is equal."""
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    ours = hf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected, own = theirs.state_dict(), ours.state_dict()
    equal = sum(torch.equal(own[name], tensor) for name, tensor in expected.items())
    print(f"tensors: {equal} of {len(expected)} equal, bit for bit")
    reference = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    same = tokenizer(TEXT)["input_ids"] == reference(TEXT)["input_ids"]
    print(f"tokens of a text: {'equal' if same else 'different'}")
    messages = [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(messages, **options)
    answers = [net.generate(**inputs, max_new_tokens=20, do_sample=False) for net in (theirs, ours)]
    print(f"greedy answers: {'equal' if torch.equal(*answers) else 'different'}")
    print(tokenizer.decode(answers[1][0, inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
