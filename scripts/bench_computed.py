"""What it costs to compute tensors while they are read or written: adapters, vocabularies, fp8.

    python scripts/bench_computed.py FOLDER                # 0.5B parameters, a few minutes
    python scripts/bench_computed.py FOLDER --size 20M --rounds 1

Each merge is a passthrough of one model of scripts/synthetic.py, or of the same model as it comes
with an adapter on every linear layer, with 64 tokens more before all others (a union of two
vocabularies), with every row of its embedding in another place, or stored in fp8 with scales by
blocks; or the model is written in fp8. The peer is a soup of that one model:
the same bytes read, computed and written. Whole processes take turns; the ratio of CPU seconds is
the median of the rounds', least and largest in brackets. The page cache is warm. Peaks are of
memory that no file backs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from bench_process import Turns
from synthetic import SIZES, Settings, make_family


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write_adapter(model: Path, out: Path, rank: int) -> None:
    """Small random factors for every linear layer."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    factors = {}
    generator = torch.Generator().manual_seed(0)
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in list(file.keys()):
            if linear(name):
                rows, columns = file.get_slice(name).get_shape()
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                for end, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                    noise = torch.randn(shape, generator=generator) * 0.01
                    factors[f"{prefix}.{end}.weight"] = noise.bfloat16()
    out.mkdir()
    save_file(factors, out / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (out / "adapter_config.json").write_text(json.dumps(about))


def write_fp8(model: Path, out: Path) -> None:
    """Every linear layer in fp8 with scales of blocks of 128 x 128."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, value in load_file(model / "model.safetensors").items():
        if not linear(name):
            tensors[name] = value
            continue
        grid = [-(-n // 128) for n in value.shape]
        scale = torch.rand(grid) * 0.001 + 0.001
        spread = scale.repeat_interleave(128, 0)[: value.shape[0]]
        spread = spread.repeat_interleave(128, 1)[:, : value.shape[1]]
        tensors[name] = (value.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (out / "config.json").write_text(json.dumps(config))


def write_grown(model: Path, out: Path) -> None:
    """With 64 tokens more, before all others."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tokens = len(tensors["model.embed_tokens.weight"])
    for name, value in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([value[:64] * 0.5, value])
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": tokens + 64}))
    write_tokenizer(out, [*range(tokens, tokens + 64), *range(tokens)])


def write_tokenizer(folder: Path, order: list[int]) -> None:
    vocabulary = {f"t{token}": number for number, token in enumerate(order)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []})
    )


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    def through(model: str, **more: Any) -> dict[str, Any]:
        return {"merge_method": "passthrough", "models": [{"model": model}], **more}

    soup = {"merge_method": "soup", "models": [{"model": "model0"}]}
    return {
        "soup of one model": soup,
        "adapter, rank 16": through("model0+rank16"),
        "adapter, rank 64": through("model0+rank64"),
        "union with 64 tokens more": {
            **through("grown"),
            "base_model": "model0",
            "tokenizer_source": "union",
        },
        "another vocabulary": {
            **through("shuffled"),
            "base_model": "model0",
            "tokenizer_source": "base",
        },
        "fp8": through("fp8"),
        "written in fp8": through("model0", out_dtype="fp8"),
    }


def prepare(folder: Path, size: str) -> None:
    make_family(folder, Settings(SIZES[size], sources=1))
    model = folder / "model0"
    for rank in (16, 64):
        if not (folder / f"rank{rank}").exists():
            write_adapter(model, folder / f"rank{rank}", rank)
    if not (folder / "fp8").exists():
        write_fp8(model, folder / "fp8")
    shuffled = folder / "shuffled"
    if not shuffled.exists():
        import random

        shuffled.mkdir()
        os.link(model / "model.safetensors", shuffled / "model.safetensors")
        shutil.copyfile(model / "config.json", shuffled / "config.json")
        order = list(range(SIZES[size].vocabulary))
        write_tokenizer(model, order)
        random.Random(0).shuffle(order)
        write_tokenizer(shuffled, order)
    if not (folder / "grown").exists():
        write_grown(model, folder / "grown")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="0.5B", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="another checkout, measured in the same rounds")
    parser.add_argument("--only", action="append", default=[], help="a part of a row's label")
    given = parser.parse_args()
    prepare(given.folder, given.size)
    commands = {}
    for number, (label, recipe) in enumerate(recipes(given.folder).items()):
        file, out = given.folder / f"recipe{number}.yaml", given.folder / "out"
        file.write_text(json.dumps(recipe))
        commands[label] = ["run", "-q", "--device", "cpu", str(file), str(out)]
    turns = Turns(
        commands, given.folder, given.folder / "out", given.rounds, given.before, given.only
    )
    turns.run(given.size)


if __name__ == "__main__":
    main()
