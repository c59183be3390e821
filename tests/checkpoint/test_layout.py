"""Shards come out byte for byte as safetensors and transformers would write them."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_cli.checkpoint.dtypes import DTYPES, width_of
from merge_cli.checkpoint.layout import OutputTensor, indexes, lay_out, natural_key
from tests.support.tiny import Family, merge

TYPES = [d for d in DTYPES if d not in ("F8_E8M0",)]


def test_header_is_what_save_file_writes(tmp_path: Path) -> None:
    """Every dtype, odd sizes, an empty and a scalar tensor, names that JSON must escape."""
    tensors = {
        f"{kind}.{i}": torch.zeros(3 + i, 2, dtype=getattr(torch, DTYPES[kind][1]))
        for i, kind in enumerate(reversed(TYPES))
    }
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0), 'q"\\é\n': torch.zeros(1)}
    tensors |= {f"layer.{i}": torch.zeros(1) for i in (2, 10, 1)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    names = {v: k for k, (_, v) in DTYPES.items()}
    outputs = [
        OutputTensor(n, names[str(t.dtype).removeprefix("torch.")], tuple(t.shape))
        for n, t in tensors.items()
    ]
    (shard,) = lay_out(outputs, 10**9)
    written = (tmp_path / "x.safetensors").read_bytes()
    assert written.startswith(shard.header)
    assert shard.size == len(written)


@pytest.mark.parametrize("shard_size", [10**9, 3000, 1])
def test_whole_files_are_what_save_file_writes(
    family: Family, tmp_path: Path, shard_size: int
) -> None:
    out = tmp_path / "out"
    tensors = merge(family.recipe("soup", base=False), out, shard_size=shard_size)
    for file in out.glob("*.safetensors"):
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        save_file({n: tensors[n] for n in names}, tmp_path / "again", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes()


def test_shards_and_index_are_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m", max_shard_size=60_000)
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [m]\n")
    merge(tmp_path / "r.yaml", tmp_path / "out", shard_size=60_000)
    ours = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    files = sorted(p.name for p in (tmp_path / "out").glob("model-*.safetensors"))
    assert files == sorted(set(ours["weight_map"].values()))
    assert all(f"of-{len(files):05d}" in name for name in files)


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    tensors = [OutputTensor(n, "F32", (s,)) for n, s in [("a", 10), ("b", 100), ("c", 10)]]
    shards = lay_out(tensors, 120)
    assert [list(s.offsets) for s in shards] == [["a"], ["b"], ["c"]]
    found = indexes(shards, tensors, {"": "model"})
    assert list(found) == ["model.safetensors.index.json"]
    assert json.loads(found["model.safetensors.index.json"])["metadata"]["total_size"] == 480


@given(st.lists(st.integers(0, 5), max_size=9), st.integers(1, 12))
def test_shards_are_filled_one_after_another(sizes: list[int], shard_size: int) -> None:
    tensors = [OutputTensor(f"{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards: list[list[str]] = []
    room = -1
    for tensor in tensors:
        if tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(tensor.name)
        room -= tensor.nbytes
    assert [[*shard.offsets] for shard in lay_out(tensors, shard_size)] == (shards or [[]])


def test_natural_order() -> None:
    names = ["layers.10.w", "layers.9.w", "embed", "norm", "layers.1.w"]
    ordered = sorted(names, key=natural_key)
    assert ordered == ["embed", "layers.1.w", "layers.9.w", "layers.10.w", "norm"]


def pairs_key(name: str) -> list[tuple[int, int, str]]:
    """Natural order, slowly: text before numbers, numbers by value."""
    parts = ["".join(run) for _, run in groupby(name, key=lambda c: c in "0123456789")]
    return [(1, int(p), "") if p[0] in "0123456789" else (0, 0, p) for p in parts]


@given(st.lists(st.text("0129ab.-", max_size=8), max_size=12))
def test_natural_order_is_the_oracles(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(names, key=pairs_key)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=6),
        st.tuples(st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 9), max_size=3)),
        max_size=6,
    ),
    st.sampled_from(["", "unet"]),
)
def test_headers_are_what_json_writes(
    entries: dict[str, tuple[str, list[int]]], folder: str
) -> None:
    prefix = f"{folder}/" if folder else ""
    tensors = [OutputTensor(prefix + n, d, tuple(shape)) for n, (d, shape) in entries.items()]
    [shard] = lay_out(tensors, 10**9, {folder: "model"})
    wide_first = sorted(tensors, key=lambda t: (-width_of(t.dtype), t.name.encode()))
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, dtype, shape in wide_first:
        begins[name] = end
        end += math.prod(shape) * width_of(dtype)
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[name], end]}
        document[name.removeprefix(prefix)] = entry
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    assert shard.header[8:].decode().rstrip(" ") == text.rstrip(" ")
    assert len(shard.header) % 8 == 0
    assert shard.offsets == {name: len(shard.header) + begin for name, begin in begins.items()}
