"""GGUF files that are written: read again by us, by the gguf package and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from merge_cli.conversion.run import convert
from merge_cli.errors import NonFiniteError, SourceError, UsageError
from merge_cli.formats.gguf.block_encoding import encode
from merge_cli.formats.gguf.blocks import BF16, Q8_0
from merge_cli.formats.gguf.header import read_header
from tests.support.command import cli, failed
from tests.support.gguf_files import write_gguf
from tests.support.tiny import read_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def model(tmp_path: Path, architecture: str = "llama", dtype: str = "BF16", **changed: Any) -> Path:
    """A folder, with a tokenizer, and keys of its config changed."""
    file = write_gguf(tmp_path / f"{architecture}.gguf", architecture, dtype)
    folder = convert(str(file), tmp_path / "model").path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["", "float16", "float32"])
def test_there_and_back(tmp_path: Path, architecture: str, kind: str) -> None:
    folder = model(tmp_path, architecture)
    written = convert(str(folder), tmp_path / "w.gguf", dtype=kind)
    assert written.bytes == written.path.stat().st_size
    back = convert(str(written.path), tmp_path / "back", dtype="bfloat16").path
    own, again = read_model(folder), read_model(back)
    assert own.keys() == again.keys()
    exact = kind != "float16"  # whose small numbers have fewer digits
    for name, tensor in own.items():
        if exact:
            assert torch.equal(again[name], tensor), name
        torch.testing.assert_close(again[name], tensor)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, back)]
    assert configs[0] == configs[1] | {"dtype": "bfloat16"}
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (folder / name).read_bytes() == (back / name).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_other_readers(tmp_path: Path, architecture: str) -> None:
    gguf = pytest.importorskip("gguf")
    folder = model(tmp_path, architecture)
    convert(str(folder), tmp_path / "w.gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "w.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="w.gguf", dtype=torch.float32
    ).state_dict()
    ours = read_model(convert(str(tmp_path / "w.gguf"), tmp_path / "b", dtype="float32").path)
    own = read_model(folder)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        expected = own[name].float()
        if tensor.ndim > 1:  # half a step of 127
            bound = expected.view(-1, 32).abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-3)
            assert ((tensor - expected).view(-1, 32).abs() <= bound).all()
        else:
            assert torch.equal(tensor, expected)


def test_blocks_as_the_gguf_package_writes_them() -> None:
    gguf = pytest.importorskip("gguf")
    numbers = np.random.default_rng(0).normal(0, 1, 64_000).astype(np.float32)
    numbers[:32] = 0
    numbers[64:96] = np.arange(32) + 0.5
    for kind in (Q8_0, BF16):
        expected = gguf.quants.quantize(numbers.reshape(-1, 64), gguf.GGMLQuantizationType(kind[0]))
        assert encode(numbers, kind) == expected.tobytes()


def test_positions_of_llama_3(tmp_path: Path) -> None:
    folder = model(tmp_path, rope_scaling=LLAMA3, rope_theta=500000.0)
    convert(str(folder), tmp_path / "w.gguf")
    assert "rope_freqs.weight" in {t.name for t in read_header(tmp_path / "w.gguf", "").tensors}
    back = convert(str(tmp_path / "w.gguf"), tmp_path / "back").path
    config = json.loads((back / "config.json").read_text())
    expected = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert config["rope_scaling"] == expected
    assert config["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "gelu"}, "of hidden_act"),
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"num_hidden_layers": 1}, "no name for it"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"vocab_size": 299}, "shape"),
        ({"tie_word_embeddings": True}, "of tie_word_embeddings"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "not Llama 3.1's"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of rope_"),
    ],
)
def test_what_cannot_be_said_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    folder = model(tmp_path, **changed)
    with pytest.raises(SourceError, match=message):
        convert(str(folder), tmp_path / "w.gguf")
    assert not (tmp_path / "w.gguf").exists()


def test_tokenizers_that_cannot_be_said_are_refused(tmp_path: Path) -> None:
    folder = model(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    for changed in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [{"id": 0, "content": "x"}]},  # without what the package asks for
        {"model": {**document["model"], "vocab": {**document["model"]["vocab"], "far": 300}}},
    ):
        (folder / "tokenizer.json").write_text(json.dumps(document | changed))
        with pytest.raises(SourceError, match="its tokenizer cannot be written"):
            convert(str(folder), tmp_path / "w.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        convert(str(folder), tmp_path / "w.gguf")


def test_numbers_that_a_kind_has_not(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = model(tmp_path)
    tensors = read_model(folder)
    for value, kind in ((float("nan"), ""), (70000.0, "float16")):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["model.layers.0.mlp.up_proj.weight"][3, 3] = value
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NonFiniteError):
            convert(str(folder), tmp_path / "w.gguf", dtype=kind)
        assert not (tmp_path / "w.gguf").exists()


def test_the_command(tmp_path: Path) -> None:
    folder = model(tmp_path)
    out = tmp_path / "w.gguf"
    assert cli("convert", folder, out, "--dtype", "q8_0", "--json").returncode == 0
    failed(cli("convert", folder, out), 2, "exists already")
    assert cli("convert", folder, out, "--overwrite").returncode == 0
    failed(cli("convert", out, out, "--overwrite"), 2, "would replace")
    failed(cli("convert", folder, tmp_path / "x.gguf", "--dtype", "int8"), 2, "q8_0")
    with pytest.raises(UsageError, match="--config is not for"):
        convert(str(folder), tmp_path / "x.gguf", config="other")
