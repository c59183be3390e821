"""Gemma, mixtures of experts and Phi 3 in GGUF: read as transformers reads them, written back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import merge_cli
from merge_cli.conversion.run import convert
from merge_cli.errors import SourceError
from merge_cli.formats.gguf.architectures import (
    ARCHITECTURES,
    Shapes,
    expected_tensors,
    model_type_of,
)
from merge_cli.formats.gguf.header import read_header
from merge_cli.options import MergeOptions
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.gguf_files import Sizes, write_gguf
from tests.support.tiny import read_model

KINDS = ("gemma", "gemma2", "gemma3", "mixtral", "qwen2moe", "qwen3moe", "phi3")
TIED = ("gemma", "gemma2", "gemma3")
SHAPES = Shapes(32, 16, 2, 64, 4, 2, 8, experts=4, expert_mlp=8, shared_mlp=8)
MIXTURES = ("mixtral", "qwen2moe", "qwen3moe")
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def file_of(tmp_path: Path, kind: str, dtype: str = "F32", **changed: Any) -> Path:
    return write_gguf(tmp_path / f"{kind}.gguf", kind, dtype, tied=kind in TIED, **changed)


def loaded(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gemma", "mixtral")])
def test_the_same_model_as_transformers_reads(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf")
    file = file_of(tmp_path, kind, "F16")
    ours = loaded(convert(str(file), tmp_path / "out", dtype="float32").path)
    # transformers leaves some of a file's keys to the defaults of its classes: they get our config.
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, config=config
    ).eval()
    own, expected = ours.state_dict(), theirs.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(model_type: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = ARCHITECTURES[model_type]
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name)
    table = gguf.get_tensor_name_map(number, 2)
    names = {item.name: item.names for item in expected_tensors(kind, SHAPES, {"output.weight"})}
    for old, own in names.items():
        plain = re.sub(r"experts\.\d+", "experts", own[0])
        if model_type == "gemma2" and plain.endswith("post_attention_layernorm.weight"):
            continue  # the package has one table for all: there it is what others call ffn_norm
        assert table.get_name(plain, try_suffixes=(".weight", ".bias")) == old, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_there_and_back(tmp_path: Path, kind: str, dtype: str) -> None:
    first = convert(str(file_of(tmp_path, kind)), tmp_path / "model", dtype="float32").path
    written = convert(str(first), tmp_path / "w.gguf", dtype=dtype).path
    second = convert(str(written), tmp_path / "back", dtype="float32").path
    own, again = read_model(first), read_model(second)
    assert own.keys() == again.keys()
    for name, tensor in own.items():
        if dtype == "float32":
            assert torch.equal(again[name], tensor), name
        bound = tensor.abs().max() * (0.5 / 127 + 1e-3)
        assert (again[name] - tensor).abs().max() <= bound, name
    configs = [json.loads((path / "config.json").read_text()) for path in (first, second)]
    assert configs[0] == configs[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_cut_from_their_stack(tmp_path: Path, kind: str) -> None:
    sizes = Sizes()
    source = open_source(ModelRef(str(file_of(tmp_path, kind))), tmp_path)
    stack = next(
        t for t in read_header(tmp_path / f"{kind}.gguf", "").tensors
        if t.name == "blk.1.ffn_up_exps.weight"
    )  # fmt: skip
    raw = (tmp_path / f"{kind}.gguf").read_bytes()[stack.offset :][: stack.nbytes]
    values = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(stack.shape)
    pattern = ("model.layers.1.block_sparse_moe.experts.{}.w3.weight" if kind == "mixtral"
               else "model.layers.1.mlp.experts.{}.up_proj.weight")  # fmt: skip
    out = merge_cli.merge(
        {"merge_method": "passthrough", "models": [{"model": str(tmp_path / f"{kind}.gguf")}]},
        tmp_path / "out",
        options=MergeOptions(device="cpu", threads=1),
    ).path
    merged = read_model(out)
    for number in range(sizes.experts):
        assert pattern.format(number) in source.tensors
        assert torch.equal(merged[pattern.format(number)], values[number])
    with torch.no_grad():
        assert loaded(out)(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_in_q8_0_is_merged(tmp_path: Path, kind: str) -> None:
    """Experts of a quantised stack are read where their blocks are."""
    first = convert(str(file_of(tmp_path, kind)), tmp_path / "model", dtype="float32").path
    convert(str(first), tmp_path / "q.gguf", dtype="q8_0")
    twin = convert(str(tmp_path / "q.gguf"), tmp_path / "twin", dtype="float32").path
    outs = [
        merge_cli.merge(
            {"merge_method": "linear", "dtype": "float32", "parameters": {"weight": 0.5},
             "models": [{"model": str(one)}, {"model": str(first)}]},
            tmp_path / f"out-{number}",
            options=MergeOptions(device="cpu", threads=2),
        ).path
        for number, one in enumerate((tmp_path / "q.gguf", twin))
    ]  # fmt: skip
    left, right = (read_model(out) for out in outs)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_norms_of_gemma_are_stored_from_one(tmp_path: Path) -> None:
    file = file_of(tmp_path, "gemma2")
    read = read_model(convert(str(file), tmp_path / "out", dtype="float32").path)
    assert abs(read["model.norm.weight"].mean()) < 0.2
    header = read_header(tmp_path / "gemma2.gguf", "")
    entry = next(t for t in header.tensors if t.name == "output_norm.weight")
    raw = (tmp_path / "gemma2.gguf").read_bytes()[entry.offset :][: entry.nbytes]
    stored = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    assert torch.equal(read["model.norm.weight"], stored - 1)


def test_settings_of_gemma(tmp_path: Path) -> None:
    def config(kind: str, **changed: Any) -> dict[str, Any]:
        source = open_source(ModelRef(str(file_of(tmp_path, kind, **changed))), tmp_path)
        return dict(source.config)

    two = config("gemma2")
    assert (two["attn_logit_softcapping"], two["final_logit_softcapping"]) == (40.0, 20.0)
    assert (two["sliding_window"], two["query_pre_attn_scalar"]) == (16, 8)
    large = config("gemma2", sizes=Sizes(layers=46, heads=2, kv_heads=1))
    assert large["query_pre_attn_scalar"] == 16  # hidden / heads, in the largest alone
    three = config("gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert three["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert three["rope_local_base_freq"] == 10000.0
    assert config("gemma3", rope__freq_base_swa=5000.0)["rope_local_base_freq"] == 5000.0


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        ("gemma2", {"expert_count": 4}, "mixture of 4 experts of the architecture gemma2"),
        ("mixtral", {"expert_used_count": 9}, "expert_used_count must be from 1 to 4"),
        ("mixtral", {"expert_count": 3}, "has shape"),
        ("qwen3moe", {"expert_weights_scale": 2.0}, "expert_weights_scale is not understood"),
        ("phi3", {"rope__scaling__type": "longrope"}, "longrope"),
        ("gemma3", {"attention__sliding_window": None}, "sliding_window must be"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, kind: str, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        open_source(ModelRef(str(file_of(tmp_path, kind, **changed))), tmp_path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder = convert(str(file_of(tmp_path, "qwen3moe")), tmp_path / "m", dtype="float32").path
    config = json.loads((folder / "config.json").read_text())
    for key, value in {"norm_topk_prob": False, "mlp_only_layers": [0]}.items():
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(SourceError, match=f"of {key}"):
            convert(str(folder), tmp_path / "w.gguf")
    folder = convert(str(file_of(tmp_path, "gemma2")), tmp_path / "g", dtype="float32").path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 64}))
    with pytest.raises(SourceError, match="of query_pre_attn_scalar"):
        convert(str(folder), tmp_path / "w.gguf")


def test_every_architecture_is_found_by_its_name() -> None:
    for model_type, kind in ARCHITECTURES.items():
        assert model_type_of(kind.name, bool(kind.experts)) == model_type
    assert model_type_of("rwkv6", False) == model_type_of(None, True) == ""
