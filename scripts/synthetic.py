"""Families of models of any size for benchmarks: real shapes, weights that look like weights.

    python scripts/synthetic.py OUT --size 1.5B [--sources 3] [--shards 100] [--layers 9]

Writes OUT/base and the fine-tunes OUT/model0, OUT/model1, ... in bfloat16. A fine-tune is the base
plus small gaussian changes; the last one's changes are sparse: about 90 % of them are exactly zero.
Values are drawn once into a pool for each model and repeated along its files, so that a family is
written at the speed of the disk in 400 MB of memory; the pool is long against a tensor's rows, and
its length divides nothing, which is all that a merge can notice.

OUT appears only when it is complete, with OUT/family.json: the same command then does nothing.
numpy is imported where it is used: the benchmark imports this file and has to stay small itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Grows when the same settings would give other bytes, so that old families are not reused.
VERSION = 1
_POOL = 16_777_213  # the largest prime below 2**24
_CHUNK = 4 * 2**20
_SHARD_BYTES = 5_000_000_000
_BASE_STD, _DELTA_STD, _SPARSE_DENSITY = 0.02, 0.0005, 0.1

Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """The dimensions of a Llama, or of a mixture of experts where there are `experts`.

    Attributes:
        feed_forward: of the layer, or of each expert.
        key_value: heads for keys and values times their width.
        tied: no lm_head of its own.
    """

    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    key_value: int
    tied: bool = True
    experts: int = 0

    @property
    def heads(self) -> int:
        return max(1, self.hidden // 128)

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


SIZES = {
    "tiny": Size(2, 128, 384, 2_000, 128),
    "20M": Size(9, 384, 1024, 16_000, 128),
    "small": Size(120, 256, 768, 16_000, 128),
    "0.5B": Size(24, 896, 4864, 151_936, 128),
    "moe": Size(60, 512, 176, 32_000, 128, experts=60),
    "1.5B": Size(28, 1536, 8960, 151_936, 256),
    "8B": Size(32, 4096, 14_336, 128_256, 1024, tied=False),
}


@dataclass(frozen=True)
class Settings:
    """What a family is made from; the same settings give the same bytes.

    Attributes:
        shards: files of each model; 0 means as few as hold 5 GB each.
        header_only: files of holes behind true headers, for planning.
    """

    size: Size
    sources: int = 3
    shards: int = 0
    header_only: bool = False
    seed: int = 0
    version: int = VERSION


def tensors(size: Size) -> Iterator[Tensor]:
    """Names and shapes in the order of the files."""
    hidden = size.hidden
    yield "model.embed_tokens.weight", (size.vocabulary, hidden)
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}self_attn.k_proj.weight", (size.key_value, hidden)
        yield f"{at}self_attn.v_proj.weight", (size.key_value, hidden)
        yield f"{at}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
        if size.experts:  # as in Qwen3-MoE, which mergekit knows by these names
            yield f"{at}self_attn.q_norm.weight", (size.head_width,)
            yield f"{at}self_attn.k_norm.weight", (size.head_width,)
            yield f"{at}mlp.gate.weight", (size.experts, hidden)
        experts = [f"experts.{i}." for i in range(size.experts)] or [""]
        for expert in experts:
            yield f"{at}mlp.{expert}gate_proj.weight", (size.feed_forward, hidden)
            yield f"{at}mlp.{expert}up_proj.weight", (size.feed_forward, hidden)
            yield f"{at}mlp.{expert}down_proj.weight", (hidden, size.feed_forward)
    yield "model.norm.weight", (hidden,)
    if not size.tied:
        yield "lm_head.weight", (size.vocabulary, hidden)


def parameter_count(size: Size) -> int:
    return sum(math.prod(shape) for _, shape in tensors(size))


def family_bytes(settings: Settings) -> int:
    """Disk space that the family needs, without its headers."""
    if settings.header_only:
        return 0
    return 2 * parameter_count(settings.size) * (settings.sources + 1)


def is_made(folder: Path, settings: Settings) -> bool:
    """Whether the folder holds the complete family of these settings."""
    try:
        return bool(json.loads((folder / "family.json").read_text()) == asdict(settings))
    except (OSError, ValueError):
        return False


def make_family(folder: Path, settings: Settings) -> None:
    """Write the family, unless it is there already."""
    if is_made(folder, settings):
        return
    if folder.exists() and not (folder / "family.json").exists():
        raise SystemExit(f"{folder} exists and is not a family of this script; name another")
    needed = family_bytes(settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise SystemExit(f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shards = cut_shards(list(tensors(settings.size)), settings.shards)
    for name, pool in _pools(settings):
        _write_model(partial / name, settings.size, shards, pool)
    (partial / "family.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def cut_shards(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """`count` runs of tensors of about equal bytes, or as few as hold 5 GB each."""
    left = sum(2 * math.prod(shape) for _, shape in tensors)
    count = min(count or -(-left // _SHARD_BYTES), len(tensors))
    shards: list[list[Tensor]] = [[]]
    held = 0
    for name, shape in tensors:
        # What is left is shared out anew after each shard: an embedding fills more than one part.
        if shards[-1] and held * (count - len(shards) + 1) >= left and len(shards) < count:
            left -= held
            held = 0
            shards.append([])
        shards[-1].append((name, shape))
        held += 2 * math.prod(shape)
    return shards


def _pools(settings: Settings) -> Iterator[tuple[str, memoryview | None]]:
    """Each model's name and the bytes that its files repeat; None where files are only headers."""
    if settings.header_only:
        yield from ((name, None) for name in _model_names(settings))
        return
    import numpy as np

    length = min(_POOL, parameter_count(settings.size))
    random = np.random.default_rng(settings.seed)
    # Rounded first: where a change is zero, a fine-tune then has the base's own bits.
    base = _bfloat16_bits(random.standard_normal(length, np.float32) * np.float32(_BASE_STD))
    weights = (base.astype(np.uint32) << 16).view(np.float32)
    for number, name in enumerate(_model_names(settings)):
        if number == 0:
            yield name, memoryview(base).cast("B")
            continue
        value = random.standard_normal(length, np.float32)
        value *= np.float32(_DELTA_STD)
        if number == settings.sources > 1:
            value[random.random(length, np.float32) >= _SPARSE_DENSITY] = 0
        value += weights
        yield name, memoryview(_bfloat16_bits(value)).cast("B")


def _model_names(settings: Settings) -> list[str]:
    return ["base", *(f"model{i}" for i in range(settings.sources))]


def _bfloat16_bits(value: Any) -> Any:
    """float32 array to the bits of its nearest bfloat16, half to even; `value` is overwritten."""
    import numpy as np

    bits = value.view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    bits >>= 16
    return bits.astype(np.uint16)


def _write_model(
    folder: Path, size: Size, shards: list[list[Tensor]], pool: memoryview | None
) -> None:
    """config.json, the shards, and their index where there are several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_config(size), indent=2) + "\n")
    weight_map: dict[str, str] = {}
    position = 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
        position = _write_shard(folder / file, shard, pool, position)
    if len(shards) > 1:
        index = {"metadata": {"total_size": position}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, shard: list[Tensor], pool: memoryview | None, position: int) -> int:
    """One file, its bytes taken from the pool from `position` on; returns where it stopped."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, shape in shard:
        end = size + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stop = position + size
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if pool is None:
            file.truncate(8 + len(text) + size)
            return stop
        while position < stop:
            start = position % len(pool)
            part = pool[start : start + min(stop - position, _CHUNK)]
            file.write(part)
            position += len(part)
    return stop


def _config(size: Size) -> dict[str, Any]:
    """config.json of the architecture whose names `tensors` uses."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "vocab_size": size.vocabulary,
        "num_attention_heads": size.heads,
        "head_dim": size.head_width,
        "num_key_value_heads": max(1, size.key_value // size.head_width),
        "tie_word_embeddings": size.tied,
        "dtype": "bfloat16",
    }
    if size.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": size.experts,
            "num_experts_per_tok": min(4, size.experts),
            "moe_intermediate_size": size.feed_forward,
        }
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--layers", type=int, help="instead of the size's own number")
    parser.add_argument("--experts", type=int, help="instead of the size's own number")
    parser.add_argument("--sources", type=int, default=3, help="fine-tunes beside the base")
    parser.add_argument("--shards", type=int, default=0, help="files of each model")
    parser.add_argument("--header-only", action="store_true", help="holes behind true headers")
    given = parser.parse_args()
    changed = {"layers": given.layers, "experts": given.experts}
    size = replace(SIZES[given.size], **{k: v for k, v in changed.items() if v})
    settings = Settings(size, given.sources, given.shards, given.header_only)
    make_family(given.out, settings)
    count, names = parameter_count(size), sum(1 for _ in tensors(size))
    print(f"{given.out}: base and {given.sources} models of {count:,} parameters, {names} tensors")


if __name__ == "__main__":
    main()
