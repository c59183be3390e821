"""GGUF files, byte by byte: also those that no writer would write."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.vocabularies import TEXTS, bpe

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8}


@dataclass(frozen=True)
class Raw:
    """A value with the type that it is written as, rather than the one that suits it."""

    kind: int
    content: bytes


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encoded(value: Any) -> bytes:
    """A value of a key, with its type."""
    if isinstance(value, Raw):
        return struct.pack("<I", value.kind) + value.content
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    first = value[0]
    if isinstance(first, str):
        body = b"".join(map(text, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + body
    kind, code = (FLOAT32, "f") if isinstance(first, float) else (INT32, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, kind, len(value), *value)


@dataclass(frozen=True)
class Entry:
    """A tensor: its type's number, its shape with rows first, its bytes, and a wrong offset."""

    kind: int
    shape: Sequence[int]
    content: bytes
    offset: int | None = None


def float_entry(values: Any, dtype: str = "F32") -> Entry:
    """A tensor of floats."""
    array = np.asarray(values, np.float32)
    content = {
        "F32": array.tobytes,
        "F16": array.astype(np.float16).tobytes,
        # The upper half: what is given should be exact in bfloat16.
        "BF16": (array.view(np.uint32) >> 16).astype(np.uint16).tobytes,
    }[dtype]()
    return Entry(TYPES[dtype], array.shape, content)


def gguf_bytes(
    values: Mapping[str, Any], tensors: Mapping[str, Entry], *, version: int = 3,
    alignment: int = 32, counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """A whole file; `counts` are written instead of the true ones."""
    table, data = b"", b""
    for name, entry in tensors.items():
        data += bytes(-len(data) % alignment)
        offset = len(data) if entry.offset is None else entry.offset
        table += text(name) + struct.pack("<I", len(entry.shape))
        table += struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape))
        table += struct.pack("<IQ", entry.kind, offset)
        data += entry.content
    tensor_count, pair_count = counts or (len(tensors), len(values))
    pairs = b"".join(text(key) + encoded(value) for key, value in values.items())
    header = b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + pairs + table
    return header + bytes(-len(header) % alignment) + data


def vocabulary(pre: str = "gpt-2", size: int = 300) -> dict[str, Any]:
    """Keys of a byte-level vocabulary, trained on a few words."""
    special = ("<s>", "</s>", "<|turn|>")
    model = bpe(TEXTS, size, special)
    tokens = sorted(model.get_vocab(), key=model.get_vocab().__getitem__)
    import json

    merges = json.loads(model.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


GGUF_NAMES = {"mixtral": "llama"}  # where tests know them by another one
_ROUTER = "ffn_gate_inp"


@dataclass(frozen=True)
class Sizes:
    """Of a tiny model."""

    layers: int = 2
    hidden: int = 32
    mlp: int = 64
    heads: int = 4
    kv_heads: int = 2
    head: int = 8
    vocabulary: int = 300
    experts: int = 4
    expert_mlp: int = 48
    shared_mlp: int = 96

    def keys(self, architecture: str = "llama") -> dict[str, Any]:
        about = {
            "vocab_size": self.vocabulary,
            "block_count": self.layers,
            "context_length": 256,
            "embedding_length": self.hidden,
            "feed_forward_length": self.mlp,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "rope.dimension_count": self.head,
            "rope.freq_base": 50000.0,
            "attention.layer_norm_rms_epsilon": 1e-6,
        }
        about |= self._more(architecture)
        name = GGUF_NAMES.get(architecture, architecture)
        named = {f"{name}.{key}": value for key, value in about.items()}
        return {"general.architecture": name, **named}

    def _more(self, architecture: str) -> dict[str, Any]:
        """The keys that not all have."""
        if architecture in ("gemma2", "gemma3"):
            caps = {"attn_logit_softcapping": 40.0} if architecture == "gemma2" else {}
            caps |= {"final_logit_softcapping": 20.0} if architecture == "gemma2" else {}
            return {"attention.sliding_window": 16, **caps}
        if architecture == "phi3":
            return {"attention.sliding_window": 0, "rope.scaling.original_context_length": 128}
        if architecture not in ("mixtral", "qwen2moe", "qwen3moe"):
            return {}
        more = {"expert_count": self.experts, "expert_used_count": 2}
        if architecture != "mixtral":
            more["expert_feed_forward_length"] = self.expert_mlp
        if architecture == "qwen2moe":
            more["expert_shared_feed_forward_length"] = self.shared_mlp
        return more

    def shapes(self, architecture: str = "llama", *, tied: bool = False) -> dict[str, list[int]]:
        """Names in the file, and shapes."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        layer = {
            "attn_norm": [self.hidden],
            "attn_q": [queries, self.hidden],
            "attn_k": [keys, self.hidden],
            "attn_v": [keys, self.hidden],
            "attn_output": [self.hidden, queries],
            "ffn_norm": [self.hidden],
            "ffn_gate": [self.mlp, self.hidden],
            "ffn_up": [self.mlp, self.hidden],
            "ffn_down": [self.hidden, self.mlp],
        }
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            layer |= {"attn_q_norm": [self.head], "attn_k_norm": [self.head]}
        if architecture in ("gemma2", "gemma3"):
            layer |= {"post_attention_norm": [self.hidden], "post_ffw_norm": [self.hidden]}
        if architecture == "phi3":
            for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
                del layer[name]
            layer["attn_qkv"] = [queries + 2 * keys, self.hidden]
            layer["ffn_up"] = [2 * self.mlp, self.hidden]
        if architecture in ("mixtral", "qwen2moe", "qwen3moe"):
            width = self.mlp if architecture == "mixtral" else self.expert_mlp
            for name in ("ffn_gate", "ffn_up"):
                del layer[name]
                layer[f"{name}_exps"] = [self.experts, width, self.hidden]
            del layer["ffn_down"]
            layer["ffn_down_exps"] = [self.experts, self.hidden, width]
            layer["ffn_gate_inp"] = [self.experts, self.hidden]
        if architecture == "qwen2moe":
            layer["ffn_gate_inp_shexp"] = [self.hidden]
            layer["ffn_gate_shexp"] = layer["ffn_up_shexp"] = [self.shared_mlp, self.hidden]
            layer["ffn_down_shexp"] = [self.hidden, self.shared_mlp]
        result = {"token_embd.weight": [self.vocabulary, self.hidden]}
        for number in range(self.layers):
            result |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
            if architecture in ("qwen2", "qwen2moe"):
                for name in ("attn_q", "attn_k", "attn_v"):
                    result[f"blk.{number}.{name}.bias"] = layer[name][:1]
        result["output_norm.weight"] = [self.hidden]
        if not tied:
            result["output.weight"] = [self.vocabulary, self.hidden]
        return result


def random_tensors(
    shapes: Mapping[str, Sequence[int]], dtype: str = "F32", seed: int = 0
) -> dict[str, Entry]:
    """Matrices in a dtype, norms and routers in float32, as llama.cpp writes them."""
    generator = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        values = generator.normal(0, 0.1, shape) + (len(shape) == 1)
        exact = np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000
        is_matrix = len(shape) > 1 and f".{_ROUTER}." not in name
        made[name] = float_entry(exact.view(np.float32), dtype if is_matrix else "F32")
    return made


def write_gguf(
    path: Path, architecture: str = "llama", dtype: str = "F32", *, tied: bool = False,
    sizes: Sizes | None = None, **changed: Any,
) -> Path:  # fmt: skip
    """A tiny model; `changed` are keys of the architecture, with `__` for dots."""
    sizes = sizes or Sizes()
    keys = sizes.keys(architecture)
    for key, value in changed.items():
        name = f"{GGUF_NAMES.get(architecture, architecture)}.{key.replace('__', '.')}"
        keys.pop(name, None)
        if value is not None:
            keys[name] = value
    tensors = random_tensors(sizes.shapes(architecture, tied=tied), dtype)
    path.write_bytes(gguf_bytes({**keys, **vocabulary(size=sizes.vocabulary)}, tensors))
    return path


def blocks_entry(kind: int, elements: int, nbytes: int, shape: Sequence[int], seed: int) -> Entry:
    """A tensor in random blocks, whose scales are small and finite."""
    generator = np.random.default_rng(seed)
    count = math.prod(shape) // elements
    raw = generator.integers(0, 256, (count, nbytes), dtype=np.uint8)
    return Entry(kind, shape, raw.tobytes())
