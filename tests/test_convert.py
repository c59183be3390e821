"""Pickled checkpoints: converted without running them, whole, and exactly."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import llama_config, llama_tensors, read_model

from merge_cli.conversion.run import convert
from merge_cli.engine.options import Progress
from merge_cli.errors import ResourceError, SourceError, UsageError


def tensors(**about: Any) -> dict[str, torch.Tensor]:
    made = llama_tensors(torch.Generator().manual_seed(0), layers=2, **about)
    return {name: value.bfloat16() for name, value in made.items()}


def write(folder: Path, parts: list[Any], *, tied: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config(layers=2, tied=tied)))
    (folder / "tokenizer_config.json").write_text("{}")
    if len(parts) == 1:
        torch.save(parts[0], folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(parts):05d}.bin"
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_one_file_and_shards(tmp_path: Path) -> None:
    own = tensors()
    names = sorted(own)
    seen: list[Progress] = []
    one = convert(str(write(tmp_path / "one", [own])), tmp_path / "a", show=seen.append)
    parts = [{n: own[n] for n in names[i::3]} for i in range(3)]
    many = convert(str(write(tmp_path / "many", parts)), tmp_path / "b")
    for found in (one, many):
        read = read_model(found.path)
        assert read.keys() == own.keys()
        assert all(torch.equal(read[name], own[name]) for name in own)
        assert found.bytes == sum(t.numel() * 2 for t in own.values())
        hf.LlamaForCausalLM.from_pretrained(found.path)
        assert (found.path / "tokenizer_config.json").is_file()
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 3
    assert not (tmp_path / "b.partial").exists()
    assert seen[-1].done == seen[-1].total > 0


@pytest.mark.parametrize("tied", [True, False])
def test_shared_memory(tmp_path: Path, tied: bool) -> None:
    """A head that is the embedding is left to the config, unless the config says otherwise."""
    own = tensors()
    own["lm_head.weight"] = own["model.embed_tokens.weight"]
    whole = torch.randn(4, 16).bfloat16()
    own["model.norm.weight"] = whole[1]  # a part of a larger storage
    found = convert(str(write(tmp_path / "m", [own], tied=tied)), tmp_path / "out")
    read = read_model(found.path)
    assert ("lm_head.weight" in read) == (not tied)
    assert found.tied == (("lm_head.weight",) if tied else ())
    assert torch.equal(read["model.norm.weight"], whole[1])
    net = hf.LlamaForCausalLM.from_pretrained(found.path)
    assert torch.equal(net.lm_head.weight.bfloat16(), own["lm_head.weight"])


def test_a_wrapped_state_and_what_is_no_tensor(tmp_path: Path) -> None:
    found = convert(
        str(write(tmp_path / "m", [{"state_dict": {**tensors(), "step": 7}, "epoch": 1}])),
        tmp_path / "out",
    )
    assert read_model(found.path).keys() == tensors().keys()
    assert found.left_out == ("step",)


class Malicious:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [tensors()])
    for protocol in ("torch", "plain"):
        content = {**tensors(), "x": Malicious(tmp_path / "ran")}
        if protocol == "torch":
            torch.save(content, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
        with pytest.raises(SourceError, match="opening it would run its code"):
            convert(str(folder), tmp_path / "out")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit on addresses")
def test_a_bomb_does_not_take_the_machine(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(2**33)  # 4 bytes that say they are 32 GB
    folder = write(tmp_path / "m", [{"x": huge}])
    with pytest.raises((ResourceError, SourceError), match=r"memory|allocate"):
        convert(str(folder), tmp_path / "out", max_memory=2**28)
    assert not (tmp_path / "out").exists()


def test_a_finished_file_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tensors()
    names = sorted(own)
    folder = write(tmp_path / "m", [{n: own[n] for n in names[i::2]} for i in range(2)])
    from merge_cli.conversion import run

    whole, calls = run._in_a_process, []

    def once(model: str, file: Path, *rest: Any) -> Any:
        calls.append(file.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(model, file, *rest)

    monkeypatch.setattr(run, "_in_a_process", once)
    with pytest.raises(Exception, match="stopped"):
        convert(str(folder), tmp_path / "out")
    found = convert(str(folder), tmp_path / "out")
    assert calls == [calls[0], calls[1], calls[1]]
    read = read_model(found.path)
    assert all(torch.equal(read[name], own[name]) for name in own)


def test_what_cannot_be_converted_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [tensors()])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="exists already"):
        convert(str(folder), tmp_path / "out")
    with pytest.raises(SourceError, match="no such folder"):
        convert("./nowhere", tmp_path / "new")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        convert(str(folder), tmp_path / "new")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match="has no pickled weights"):
        convert(str(folder), tmp_path / "new")


def test_the_command_that_the_refusal_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [tensors()])
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: m}]\n")
    command = [sys.executable, "-m", "merge_cli"]
    done = subprocess.run([*command, "plan", str(recipe)], capture_output=True, text=True)
    assert done.returncode == 3
    assert "merge-cli convert m converted" in " ".join(done.stderr.split())
    done = subprocess.run(
        [*command, "convert", "--json", str(folder), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["tensors"] == len(tensors())
