"""GGUF files as models: names, order of rows, config, and files that lie."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import merge_cli
from merge_cli.checkpoint.cards import read_card
from merge_cli.conversion.run import convert
from merge_cli.errors import CorruptFileError, MergeCliError, SourceError, UsageError
from merge_cli.formats.gguf.header import read_header, shortest
from merge_cli.formats.gguf.rotary import llama3_factors
from merge_cli.options import MergeOptions
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source
from tests.support.command import cli, failed
from tests.support.gguf_files import (
    ARRAY,
    STRING,
    Entry,
    Raw,
    Sizes,
    blocks_entry,
    float_entry,
    gguf_bytes,
    random_tensors,
    vocabulary,
    write_gguf,
)  # fmt: skip
from tests.support.tiny import read_model

OPTIONS = MergeOptions(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def opened(path: Path) -> Source:
    return open_source(ModelRef(str(path)), path.parent)


def written(path: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    return read_model(convert(str(path), out, **options).path)


def stored(path: Path) -> dict[str, torch.Tensor]:
    """A file's float32 tensors by its own names."""
    raw = path.read_bytes()
    return {
        t.name: torch.from_numpy(
            np.frombuffer(raw[t.offset : t.offset + t.nbytes], np.float32).copy()
        ).view(t.shape)
        for t in read_header(path, "").tensors
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_rows(tmp_path: Path, architecture: str, tied: bool) -> None:
    file = write_gguf(tmp_path / "m.gguf", architecture, tied=tied)
    own, sizes = stored(file), Sizes()
    read = written(file, tmp_path / "out")
    assert len(read) == len(own)
    assert torch.equal(read["model.embed_tokens.weight"], own["token_embd.weight"])
    assert ("lm_head.weight" in read) == (not tied)
    queries = own["blk.1.attn_q.weight"]
    if architecture == "llama":  # pairs of rows 0 1, 2 3, ... become halves, one loop at a time
        rows = []
        for head in range(sizes.heads):
            for half in range(2):
                rows += [head * sizes.head + 2 * i + half for i in range(sizes.head // 2)]
        queries = queries[rows]
    assert torch.equal(read["model.layers.1.self_attn.q_proj.weight"], queries)
    assert torch.equal(read["model.layers.1.mlp.down_proj.weight"], own["blk.1.ffn_down.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["rms_norm_eps"] == 1e-6
    assert (config["rope_theta"], config["head_dim"]) == (50000.0, sizes.head)
    net = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(net).__name__.lower().startswith(architecture)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_same_model_as_transformers_reads(tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("gguf")
    # transformers does not read the size of a Qwen 3's heads: it is that of its default.
    sizes = Sizes(head=128 if architecture == "qwen3" else 8)
    file = write_gguf(tmp_path / "m.gguf", architecture, dtype="F16", sizes=sizes)
    convert(str(file), tmp_path / "out", dtype="float32")
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    ours = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected, own = theirs.state_dict(), ours.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_quantised_tensors_in_a_merge(tmp_path: Path) -> None:
    """A merge over the file is the merge over what it is converted to in float32."""
    sizes = Sizes(hidden=256, mlp=256, heads=8, kv_heads=4, head=32)
    keys = {**sizes.keys(), **vocabulary()}
    tensors = random_tensors(sizes.shapes())
    kinds = [(2, 32, 18), (3, 32, 20), (8, 32, 34), (12, 256, 144), (14, 256, 210)]
    matrices = [name for name, entry in tensors.items() if len(entry.shape) > 1]
    for number, name in enumerate(matrices):
        kind, elements, nbytes = kinds[number % len(kinds)]
        entry = blocks_entry(kind, elements, nbytes, tensors[name].shape, number)
        tensors[name] = Entry(entry.kind, entry.shape, calm(entry))
    (tmp_path / "q.gguf").write_bytes(gguf_bytes(keys, tensors))
    twin = written(tmp_path / "q.gguf", tmp_path / "twin", dtype="float32")
    assert all(tensor.isfinite().all() for tensor in twin.values())
    assert {t.dtype for t in written(tmp_path / "q.gguf", tmp_path / "own").values()} == {
        torch.bfloat16
    }
    write_gguf(tmp_path / "f.gguf", sizes=sizes)
    outs = []
    for name in ("q.gguf", "twin"):
        (tmp_path / "r.yaml").write_text(
            f"merge_method: linear\nmodels: [{{model: {name}}}, {{model: f.gguf}}]\n"
            "parameters: {weight: 0.5}\ndtype: float32\n"
        )
        outs.append(read_model(merge_cli.merge(
            tmp_path / "r.yaml", tmp_path / f"out-{name[0]}", options=OPTIONS).path))  # fmt: skip
    assert outs[0].keys() == outs[1].keys() == twin.keys()
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in twin)


def calm(entry: Entry) -> bytes:
    """The same blocks with scales that are finite and small."""
    nbytes = {2: 18, 3: 20, 8: 34, 12: 144, 14: 210}[entry.kind]
    raw = np.frombuffer(entry.content, np.uint8).reshape(-1, nbytes).copy()
    for at in {2: (0,), 3: (0, 2), 8: (0,), 12: (0, 2), 14: (208,)}[entry.kind]:
        raw[:, at + 1] = raw[:, at + 1] & 0x83 | 0x18
    return raw.tobytes()


def test_what_lies_beside_it(tmp_path: Path) -> None:
    """Config, tokenizer and template come with it; its own folder's files do not."""
    (tmp_path / "tokenizer.json").write_text("not its own")
    file = write_gguf(tmp_path / "m.gguf")
    convert(str(file), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], tokenize=False
    ) == "the cat"  # fmt: skip
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [1, 2]}


def test_licence_and_languages_are_its_own(tmp_path: Path) -> None:
    sizes = Sizes(layers=1)
    about = {"general.license": "apache-2.0", "general.languages": ["en", "x: [", "de"]}
    content = gguf_bytes({**sizes.keys(), **about}, random_tensors(sizes.shapes()))
    (tmp_path / "m.gguf").write_bytes(content)
    front, why = read_card(opened(tmp_path / "m.gguf").root)
    assert front == {"license": "apache-2.0", "language": ["en", "de"]}
    assert not why


def test_two_files_of_a_folder_are_two_models(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", dtype="F16")
    a, b = opened(tmp_path / "a.gguf"), opened(tmp_path / "b.gguf")
    assert a.identity != b.identity
    assert a.fingerprint() != b.fingerprint()
    assert opened(tmp_path / "a.gguf").identity == a.identity


def test_the_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = write_gguf(tmp_path / "model" / "m.gguf")
    with pytest.raises(UsageError, match="would replace"):
        convert(str(file), tmp_path / "model", overwrite=True)
    assert file.is_file()


def test_running_it_asks_for_a_conversion(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "data.txt").write_text("the cat\n")
    done = cli("evaluate", file, "--data", tmp_path / "data.txt")
    failed(done, 3, "merge-cli convert")
    (tmp_path / "r.yaml").write_text(
        "merge_method: regmean\n"
        "models: [{model: m.gguf, data: data.txt}, {model: m.gguf, data: data.txt}]\n"
    )
    failed(cli("plan", tmp_path / "r.yaml"), 3, "merge-cli convert")


def test_command_and_its_flags(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", dtype="F16")
    done = cli("convert", file, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["tensors"] == 21
    assert {t.dtype for t in read_model(tmp_path / "out").values()} == {torch.float16}
    failed(cli("convert", file, tmp_path / "b", "--dtype", "int8"), 2, "no dtype")
    (tmp_path / "folder").mkdir()
    failed(cli("convert", tmp_path / "folder", tmp_path / "b", "--dtype", "float32"), 2, "--dtype")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"expert_count": 8}, "expert_used_count must be"),
        ({"attention__clamp_kqv": 1.5}, r"attention\.clamp_kqv is not understood"),
        ({"rope__scaling__type": "longrope"}, "'longrope' is not understood"),
        ({"attention__head_count_kv": 3}, "heads do not share 3"),
        ({"attention__head_count": 0}, "head_count must be from 1"),
        ({"rope__dimension_count": 4}, "rope.dimension_count is 4"),
        ({"block_count": 3}, "9 tensors are missing"),
        ({"block_count": 1}, "9 tensors that are not understood"),
        ({"feed_forward_length": 63}, "has shape"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "must be a number above 0"),
        ({"block_count": None}, "block_count must be a whole number"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", **changed)
    with pytest.raises(SourceError, match=message):
        opened(file)


def test_other_architectures_and_types_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes({"general.architecture": "rwkv6"}, {}))
    with pytest.raises(SourceError, match="'rwkv6', which is not read"):
        opened(file)
    file.write_bytes(gguf_bytes({}, {"w": Entry(16, [1, 256], bytes(66))}))
    with pytest.raises(SourceError, match="IQ2_XXS, which is not read"):
        opened(file)
    file.write_bytes(gguf_bytes({"split.count": 2}, {}))
    with pytest.raises(SourceError, match="one of 2 parts"):
        opened(file)
    for version, kind in ((1, "of version 1"), (3 << 24, "in big-endian byte order")):
        file.write_bytes(gguf_bytes({}, {}, version=version))
        with pytest.raises(SourceError, match=kind):
            opened(file)


@pytest.mark.parametrize(
    ("scaling", "config"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"type": "none"}, None),
    ],
)
def test_scaled_positions(tmp_path: Path, scaling: dict[str, Any], config: Any) -> None:
    changed = {f"rope__scaling__{key}": value for key, value in scaling.items()}
    file = write_gguf(tmp_path / "m.gguf", "qwen2", **changed)
    assert opened(file).config.get("rope_scaling") == config


def test_factors_of_llama_3(tmp_path: Path) -> None:
    """The factors that llama.cpp stores are those that transformers computes; no others are."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = hf.LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    factors = (plain / scaled.double()).numpy()
    np.testing.assert_allclose(llama3_factors(128, 500000.0, 8.0), factors, rtol=1e-5)
    sizes = Sizes(hidden=128, heads=1, kv_heads=1, head=128)
    keys = {**sizes.keys(), **vocabulary(), "llama.rope.freq_base": 500000.0}
    tensors = random_tensors(sizes.shapes())
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(keys, {**tensors, "rope_freqs.weight": float_entry(factors)}))
    assert opened(file).config["rope_scaling"] == scaling
    file.write_bytes(gguf_bytes(keys, {**tensors, "rope_freqs.weight": float_entry(factors**2)}))
    with pytest.raises(SourceError, match="not Llama 3.1's"):
        opened(file)


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "other": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "tensors": (gguf_bytes({}, {}, counts=(2**60, 0)), f"{2**60} tensors"),
    "pairs": (gguf_bytes({}, {}, counts=(0, 2**40)), "key-value pairs"),
    "more pairs": (gguf_bytes({"a": 1}, {}, counts=(0, 3)), "truncated|twice"),
    "text": (gguf_bytes({"a": Raw(STRING, struct.pack("<Q", 2**62))}, {}), "a text of"),
    "list": (gguf_bytes({"a": Raw(ARRAY, struct.pack("<IQ", 4, 2**61))}, {}), "lists of more"),
    "lists": (gguf_bytes({"a": Raw(ARRAY, struct.pack("<IQ", 9, 1))}, {}), "a list of lists"),
    "texts": (gguf_bytes({"a": Raw(ARRAY, struct.pack("<IQ", 8, 9_999_999))}, {}), "truncated"),
    "type": (gguf_bytes({"a": Raw(77, b"")}, {}), "of type 77"),
    "truth": (gguf_bytes({"a": Raw(7, b"\x02")}, {}), "a truth value of 2"),
    "utf-8": (gguf_bytes({"a": Raw(STRING, struct.pack("<Q", 1) + b"\xff")}, {}), "not UTF-8"),
    "alignment 0": (gguf_bytes({"general.alignment": 0}, {}), "impossible alignment"),
    "alignment 3": (gguf_bytes({"general.alignment": 3}, {}), "no power of two"),
    "dimensions": (gguf_bytes({}, {"w": Entry(0, [1] * 5, bytes(4))}), "5 dimensions"),
    "no size": (gguf_bytes({}, {"w": Entry(0, [0], b"")}), "impossible shape"),
    "huge": (gguf_bytes({}, {"w": Entry(0, [2**40, 2**40], bytes(4))}), "truncated"),
    "blocks": (gguf_bytes({}, {"w": Entry(2, [1, 33], bytes(36))}), "no blocks of 32"),
    "offset": (gguf_bytes({}, {"w": Entry(0, [1], bytes(4), 32)}), "its data begin at 32"),
    "offset beyond": (gguf_bytes({}, {"w": Entry(0, [1], bytes(4), 2**63)}), "its data begin"),
    "overlap": (
        gguf_bytes({}, {"v": Entry(0, [9], bytes(36)), "w": Entry(0, [1], bytes(4), 0)}),
        "its data begin at 0",
    ),
    "behind": (gguf_bytes({}, {"w": Entry(0, [1], bytes(99))}), "belong to no tensor"),
    "name": (gguf_bytes({}, {"w\x1b": Entry(0, [1], bytes(4))}), "not text"),
    "twice": (
        gguf_bytes({"a": 1, "b": 1}, {}).replace(b"b", b"a"), "occurs twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    raw, message = BAD_HEADERS[name]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CorruptFileError, match=message):
        read_header(tmp_path / "m.gguf", "m")


def test_any_damage_is_an_error_or_a_model(tmp_path: Path) -> None:
    """Bytes of the header changed, and the file cut anywhere: never another exception."""
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    length = len(read_header(tmp_path / "whole.gguf", "").raw)
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(length)
            raw[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        if chance.random() < 0.3:
            del raw[chance.randrange(len(raw)) :]
        (tmp_path / "m.gguf").write_bytes(raw)
        try:
            opened(tmp_path / "m.gguf")
        except MergeCliError:
            refused += 1
    assert 100 < refused < 400


def test_shortest_numbers() -> None:
    for value in (1e-5, 1e-6, 0.1, 500000.0, 3.4028234663852886e38, 1.17549435e-38):
        raw = struct.pack("<f", value)
        assert struct.pack("<f", shortest(raw)) == raw
    assert str(shortest(struct.pack("<f", 1e-5))) == "1e-05"
