"""Files of weights as models: with the config beside them, or weights alone; pickles as data."""

from __future__ import annotations

import json
import os
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.conversion.run import convert
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.options import MergeOptions
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source
from tests.support.command import cli, failed
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(seed: int) -> Tensors:
    made = llama_tensors(torch.Generator().manual_seed(seed), layers=2)
    return {name: value.half() for name, value in made.items()}


def mean(*models: Tensors) -> Tensors:
    return {
        name: torch.stack([model[name].double() for model in models]).mean(0).half()
        for name in models[0]
    }


def opened(path: Path) -> Source:
    return open_source(ModelRef(str(path)), path.parent)


def soup(folder: Path, *models: str, **keys: Any) -> Path:
    entries = [{"model": str(folder / name)} for name in models]
    recipe = {"merge_method": "soup", "models": entries, **keys}
    return merge_cli.merge(recipe, folder / "out", options=OPTIONS).path


def equal(left: Tensors, right: Tensors) -> bool:
    same = (torch.equal(left[name], right[name]) for name in left)
    return left.keys() == right.keys() and all(same)


def test_files_without_a_config_make_one_file(tmp_path: Path) -> None:
    a, b = weights(1), weights(2)
    save_file(a, tmp_path / "first.safetensors")
    torch.save(b, tmp_path / "second.pt")
    (tmp_path / "tokenizer.json").write_text("of something else")
    (tmp_path / "soup.yaml").write_text(
        "merge_method: soup\nmodels: [{model: first.safetensors}, {model: second.pt}]\n"
    )
    done = cli("run", tmp_path / "soup.yaml", tmp_path / "out", "--shard-size", "1KB")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert equal(load_file(out / "first.safetensors"), mean(a, b))
    names = {path.name for path in out.iterdir()}
    assert not {"config.json", "tokenizer.json", "model.safetensors"} & names
    again = opened(out / "first.safetensors")  # and may be merged again
    assert again.tensors.keys() == a.keys()


def test_the_output_is_a_folder(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "a.safetensors")
    (tmp_path / "r.yaml").write_text(
        "merge_method: passthrough\nmodels: [{model: a.safetensors}]\n"
    )
    failed(cli("run", tmp_path / "r.yaml", tmp_path / "b.safetensors"), 2, "Name a folder: b.")


def test_two_files_of_one_folder_are_two_models(tmp_path: Path) -> None:
    models = [weights(seed) for seed in range(3)]
    (tmp_path / "config.json").write_text(json.dumps(llama_config(layers=2)))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"step-{number}.safetensors")
    out = soup(tmp_path, *(f"step-{number}.safetensors" for number in range(3)))
    assert equal(read_model(out), mean(*models))
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert (out / "tokenizer_config.json").is_file()
    first, same, other = (
        tmp_path / n for n in ("step-0.safetensors", "link", "step-1.safetensors")
    )
    same.symlink_to(tmp_path)
    assert opened(first).identity == opened(same / first.name).identity != opened(other).identity


def test_the_only_file_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "m", weights(0), llama_config(layers=2))
    named, folder = opened(tmp_path / "m" / "model.safetensors"), opened(tmp_path / "m")
    assert named.identity == folder.identity
    assert named.is_safetensors
    assert named.label.endswith("model.safetensors")


def test_one_shard_is_no_model(tmp_path: Path) -> None:
    write_model(tmp_path / "m", weights(0), llama_config(layers=2), shards=2)
    shard = sorted((tmp_path / "m").glob("model-*"))[0]
    with pytest.raises(SourceError, match="one of 2 files"):
        opened(shard)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(SourceError, match="not a folder, and not a file of weights"):
        opened(tmp_path / "notes.txt")


def test_scaled_fp8_of_comfyui(tmp_path: Path) -> None:
    """As the path of a file, among others of the same folder."""
    plain = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    scale = plain.abs().max() / 448
    codes = (plain / scale).to(torch.float8_e4m3fn)
    scaled = {"blocks.0.weight": codes, "blocks.0.scale_weight": scale.reshape(()),
              "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}  # fmt: skip
    save_file(scaled, tmp_path / "flux.safetensors")
    save_file({"blocks.0.weight": plain.bfloat16()}, tmp_path / "other.safetensors")
    out = soup(tmp_path, "flux.safetensors", "other.safetensors", dtype="float32")
    expected = (codes.double() * scale.double() + plain.bfloat16().double()) / 2
    read = load_file(out / "flux.safetensors")["blocks.0.weight"]
    assert torch.allclose(read.double(), expected, rtol=1e-6, atol=0)


class Trainer:
    """A class that no reader has."""

    def __init__(self) -> None:
        self.best = {"loss": [0.5, defaultdict(list, {"a": [1]})]}


def test_what_training_programs_save(tmp_path: Path) -> None:
    own = weights(3)
    # A storage that two tensors share, at an offset; a parameter; names that wrappers have changed.
    both = torch.stack([own["model.norm.weight"], own["model.layers.0.input_layernorm.weight"]])
    stored: dict[str, Any] = OrderedDict(own)
    stored["model.norm.weight"] = both[0]
    stored["model.layers.0.input_layernorm.weight"] = torch.nn.Parameter(both[1])
    compiled = OrderedDict((f"module._orig_mod.{name}", item) for name, item in stored.items())
    saved = {
        "plain.pt": stored,
        "lightning.ckpt": {"epoch": 3, "state_dict": {**stored, "step": 7}, "loops": {1, 2},
                           "optimizer_states": [{"state": {0: torch.ones(3)}}],
                           "callbacks": Trainer()},
        "ddp.pth": {"model": compiled, "optimizer": Trainer()},
    }  # fmt: skip
    for name, content in saved.items():
        torch.save(content, tmp_path / name)
        source = opened(tmp_path / name)
        assert source.tensors.keys() == own.keys(), name
    notes = " ".join(opened(tmp_path / "lightning.ckpt").notes)
    assert "epoch, loops, optimizer_states and 2 more" in notes
    assert equal(load_file(soup(tmp_path, *saved) / "plain.safetensors"), own)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({**weights(0), "x": Malicious(tmp_path / "ran")}, tmp_path / "m.pt")
    assert "x" not in opened(tmp_path / "m.pt").tensors
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.ones(4, 3).t(), "rows that are not in order"),
        (torch.ones(3, 3).to_sparse(), "no plain tensor"),
    ],
)
def test_tensors_that_are_not_read_are_named(tmp_path: Path, item: Any, words: str) -> None:
    torch.save({"odd.weight": item, "w": torch.ones(2)}, tmp_path / "m.pt")
    with pytest.raises(SourceError, match=rf"(?s)odd\.weight.*{words}|{words}.*odd\.weight"):
        opened(tmp_path / "m.pt")


def test_broken_pickles(tmp_path: Path) -> None:
    torch.save(weights(0), tmp_path / "m.pt")
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError):
        opened(tmp_path / "cut.pt")
    torch.save(weights(0), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"since 1\.6"):
        opened(tmp_path / "old.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(SourceError, match=r"no tensors of a model under its keys \(epoch\)"):
        opened(tmp_path / "none.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CorruptFileError, match="holds no state dict, but a list"):
        opened(tmp_path / "list.pt")


def test_a_file_is_converted_to_a_file(tmp_path: Path) -> None:
    own = weights(4)
    torch.save({"state_dict": own}, tmp_path / "v1-5.ckpt")
    convert(str(tmp_path / "v1-5.ckpt"), tmp_path / "out")
    assert equal(load_file(tmp_path / "out" / "v1-5.safetensors"), own)


def test_models_that_run_need_a_folder(tmp_path: Path) -> None:
    save_file(weights(0), tmp_path / "a.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\n')
    done = cli("evaluate", tmp_path / "a.safetensors", "--data", tmp_path / "rows.jsonl")
    failed(done, 3, "Convert it first")
