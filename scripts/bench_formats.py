"""What quantised weights cost: each format read, or written, against a soup in bfloat16.

    python scripts/bench_formats.py FOLDER                      # 134 million numbers, a few minutes
    python scripts/bench_formats.py FOLDER --write              # the soup is written in each format
    python scripts/bench_formats.py FOLDER --rows 512 --rounds 1

Every model has the same few matrices: of the sizes of gpt-oss's experts for MXFP4, else of a linear
layer with 4,096 inputs. Codes are random, as no time depends on them. What is read is a
passthrough; what is written with `same` is a soup of a model in that format. Each merge is a
process of its own with one thread, and its CPU seconds count. The ratio is the median of the
rounds', least and largest in brackets. The page cache is warm. Peaks are of memory that no file
backs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_process import Turns

INPUTS, MATRICES = 4096, 4
Parts = dict[str, Any]
_BNB = "weight.quant_state.bitsandbytes__nf4"


def noise(*shape: int, dtype: str = "uint8", low: int = 0, high: int = 256) -> Any:
    """Random whole numbers of a torch dtype."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if dtype == "int32":
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    return torch.randint(low, high, shape, generator=generator, dtype=getattr(torch, dtype))


def scales(*shape: int, dtype: str = "float16") -> Any:
    """Random small positive numbers."""
    import torch

    random = torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 50 + 0.001
    return random.to(getattr(torch, dtype))


def plain(rows: int) -> tuple[Parts, Parts]:
    return {"weight": scales(rows, INPUTS, dtype="bfloat16")}, {}


def mxfp4(rows: int) -> tuple[Parts, Parts]:
    """Experts of 2,880 inputs, as gpt-oss has them."""
    outputs, groups = 5760, 2880 // 32
    experts = max(1, rows * INPUTS // (outputs * 2880))
    parts = {
        "weight_blocks": noise(experts, outputs, groups, 16),
        "weight_scales": noise(experts, outputs, groups, low=115, high=122),
    }
    return parts, {"quant_method": "mxfp4"}


def nvfp4(rows: int) -> tuple[Parts, Parts]:
    import torch

    parts = {
        "weight": noise(rows, INPUTS // 2),
        "weight_scale": (scales(rows, INPUTS // 16) * 100).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.01),
    }
    return parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def packed_int4(rows: int) -> tuple[Parts, Parts]:
    import torch

    parts = {
        "weight_packed": noise(rows, INPUTS // 8, dtype="int32"),
        "weight_scale": scales(rows, INPUTS // 32, dtype="bfloat16"),
        "weight_shape": torch.tensor([rows, INPUTS]),
    }
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return parts, {"quant_method": "compressed-tensors", "config_groups": groups}


def gptq(rows: int) -> tuple[Parts, Parts]:
    parts = {
        "qweight": noise(INPUTS // 8, rows, dtype="int32"),
        "qzeros": noise(INPUTS // 128, rows // 8, dtype="int32"),
        "scales": scales(INPUTS // 128, rows),
    }
    return parts, {"quant_method": "gptq", "bits": 4, "group_size": 128}


def awq(rows: int) -> tuple[Parts, Parts]:
    parts = {
        "qweight": noise(INPUTS, rows // 8, dtype="int32"),
        "qzeros": noise(INPUTS // 128, rows // 8, dtype="int32"),
        "scales": scales(INPUTS // 128, rows),
    }
    return parts, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


def nf4(rows: int) -> tuple[Parts, Parts]:
    import torch

    size = rows * INPUTS
    stated = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, INPUTS]}
    stated |= {"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"}
    parts = {
        "weight": noise(size // 2, 1),
        "weight.absmax": noise(size // 64),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": scales(-(-size // 64 // 256), dtype="float32"),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        _BNB: torch.tensor(list(json.dumps(stated).encode()), dtype=torch.uint8),
    }
    return parts, {"quant_method": "bitsandbytes", "load_in_4bit": True}


FORMATS: dict[str, Callable[[int], tuple[Parts, Parts]]] = {
    "plain": plain,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
    "compressed-tensors int4": packed_int4,
    "GPTQ": gptq,
    "AWQ": awq,
    "bitsandbytes nf4": nf4,
}


# What is written: which model is merged, and `out_dtype`.
WRITTEN: dict[str, tuple[str, str | None]] = {
    "plain": ("plain", None),
    "fp8": ("plain", "fp8"),
    "fp8_row": ("plain", "fp8_row"),
    "fp8_tensor": ("plain", "fp8_tensor"),
    "int4": ("plain", "int4"),
    "nvfp4": ("plain", "nvfp4"),
    "mxfp4": ("plain", "mxfp4"),
    "same, compressed-tensors int4": ("compressed-tensors int4", "same"),
    "same, NVFP4": ("NVFP4", "same"),
    "same, MXFP4 of gpt-oss": ("MXFP4", "same"),
}


def recipes(*, write: bool) -> dict[str, dict[str, Any]]:
    """What is run, by name."""
    if not write:
        return {
            name: {
                "merge_method": "soup" if name == "plain" else "passthrough",
                "models": [{"model": f"./{name}"}],
            }
            for name in (*FORMATS, *(f"{kind}.gguf" for kind in BLOCKS))
        }
    return {
        label: {
            "merge_method": "soup",
            "models": [{"model": f"./{model}"}],
            **({"out_dtype": word} if word else {}),
        }
        for label, (model, word) in WRITTEN.items()
    }


def write(folder: Path, make: Callable[[int], tuple[Parts, Parts]], rows: int) -> None:
    """A model of a few matrices."""
    from safetensors.torch import save_file

    parts, settings = make(rows)
    tensors = {
        f"model.layers.{i}.linear.{part}": value.clone()
        for i in range(MATRICES)
        for part, value in parts.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", **({"quantization_config": settings} if settings else {})}
    (folder / "config.json").write_text(json.dumps(config))


BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write_gguf(file: Path, kind: str, rows: int) -> None:
    """A Llama of one layer, whose three large matrices are in blocks of one type.

    Together these have at most 2 % less numbers than the matrices of other formats.
    """
    import gguf

    block, inner, head = gguf.GGMLQuantizationType[kind], MATRICES * rows // 3 // 256 * 256, 32
    elements, size = gguf.GGML_QUANT_SIZES[block]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(INPUTS)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_context_length(4096)
    writer.add_vocab_size(32)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in (
        ("token_embd", (32, INPUTS)),
        ("output_norm", (INPUTS,)),
        ("blk.0.attn_norm", (INPUTS,)),
        ("blk.0.ffn_norm", (INPUTS,)),
        ("blk.0.attn_q", (head, INPUTS)),
        ("blk.0.attn_k", (head, INPUTS)),
        ("blk.0.attn_v", (head, INPUTS)),
        ("blk.0.attn_output", (INPUTS, head)),
    ):
        writer.add_tensor(f"{name}.weight", scales(*shape, dtype="float32").numpy())
    for name, height, width in (
        ("gate", inner, INPUTS),
        ("up", inner, INPUTS),
        ("down", INPUTS, inner),
    ):
        # Bytes so small are finite numbers wherever a block has a float16.
        raw = noise(height, width // elements * size, high=0x30).numpy()
        writer.add_tensor(f"blk.0.ffn_{name}.weight", raw, raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=8192, help="outputs of each matrix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="another checkout, measured in the same rounds")
    parser.add_argument("--only", action="append", default=[], help="a part of a row's label")
    parser.add_argument("--write", action="store_true", help="measure writing, not reading")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, make in FORMATS.items():
        if not (given.folder / name).exists():
            write(given.folder / name, make, given.rows)
    for kind in () if given.write else BLOCKS:
        file = given.folder / f"{kind}.gguf"
        measured = not given.only or any(word in file.name for word in given.only)
        if measured and not file.exists():
            write_gguf(file, kind, given.rows)
    commands = {}
    for name, recipe in recipes(write=given.write).items():
        file, out = given.folder / f"{name}.yaml", given.folder / "out"
        file.write_text(json.dumps(recipe))
        flags = ["-q", "--device", "cpu", "--threads", "1"]
        commands[name] = ["run", *flags, str(file), str(out)]
    turns = Turns(
        commands, given.folder, given.folder / "out", given.rounds, given.before, given.only
    )
    turns.run(f"{MATRICES * given.rows * INPUTS / 1e6:.0f} M")


if __name__ == "__main__":
    main()
