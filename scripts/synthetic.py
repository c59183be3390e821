"""Families of models of any size for benchmarks: Llama's shapes, weights that look like weights.

    python scripts/synthetic.py OUT --layers 28 --hidden 1536 --sources 3

A base in bfloat16 and fine-tunes of it, in shards. Values are drawn once into a pool and read from
it at a different place for each tensor, so that a family is written at the speed of the disk; the
pool is long against a tensor's rows, which is all that a merge can notice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

_POOL = 40_000_000


def shapes(
    layers: int, hidden: int, feed_forward: int, vocabulary: int, key_value: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama with tied embeddings."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}self_attn.k_proj.weight", (key_value, hidden)
        yield f"{at}self_attn.v_proj.weight", (key_value, hidden)
        yield f"{at}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
        yield f"{at}mlp.gate_proj.weight", (feed_forward, hidden)
        yield f"{at}mlp.up_proj.weight", (feed_forward, hidden)
        yield f"{at}mlp.down_proj.weight", (hidden, feed_forward)
    yield "model.norm.weight", (hidden,)


def make_family(
    out: Path, *, layers: int, hidden: int, feed_forward: int, vocabulary: int, key_value: int,
    sources: int, shard_bytes: int = 1_000_000_000, seed: int = 0,
) -> int:  # fmt: skip
    """Write `base` and `model0`, `model1`, ... under `out`; returns the parameters of one model."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator)
    tensors = list(shapes(layers, hidden, feed_forward, vocabulary, key_value))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": hidden // 128, "num_key_value_heads": key_value // 128,
        "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    for number in range(-1, sources):
        folder = out / ("base" if number < 0 else f"model{number}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        weight_map: dict[str, str] = {}
        shard: dict[str, torch.Tensor] = {}
        count, size = 0, 0
        for i, (name, shape) in enumerate(tensors):
            value = _draw(pool, shape, i * 7919) * 0.02
            if number >= 0:
                value += _draw(pool, shape, i * 104_729 + (number + 1) * 1_299_709) * 0.0005
            shard[name] = value.bfloat16()
            size += shard[name].nbytes
            if size >= shard_bytes or i == len(tensors) - 1:
                file = f"model-{count:05d}.safetensors"
                save_file(shard, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(shard, file)
                shard, size, count = {}, 0, count + 1
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(torch.Size(shape).numel() for _, shape in tensors)


def _draw(pool: torch.Tensor, shape: tuple[int, ...], start: int) -> torch.Tensor:
    """`shape` values of the pool from a place on, around its end as often as needed."""
    size = torch.Size(shape).numel()
    offset = start % len(pool)
    copies = (offset + size) // len(pool) + 1
    return pool.repeat(copies)[offset : offset + size].reshape(shape)


SIZES = {
    "0.5B": {"layers": 24, "hidden": 896, "feed_forward": 4864, "vocabulary": 151_936,
             "key_value": 128},
    "1.5B": {"layers": 28, "hidden": 1536, "feed_forward": 8960, "vocabulary": 151_936,
             "key_value": 256},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--layers", type=int, help="instead of the size's own number")
    parser.add_argument("--sources", type=int, default=3)
    given = parser.parse_args()
    options = {**SIZES[given.size], **({"layers": given.layers} if given.layers else {})}
    count = make_family(given.out, sources=given.sources, **options)
    print(f"{given.out}: base and {given.sources} models of {count:,} parameters")


if __name__ == "__main__":
    main()
