"""Pickled checkpoints: converted without running them, whole, and exactly."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from merge_cli.conversion import child
from merge_cli.conversion.run import convert
from merge_cli.errors import Interrupted, ResourceError, SourceError, UsageError
from merge_cli.options import Progress
from tests.support.command import cli
from tests.support.paths import ROOT
from tests.support.tiny import llama_config, llama_tensors, read_model


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
    weight_map: dict[str, str] = {}
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
    one = convert(str(write(tmp_path / "one", [own])), tmp_path / "a", on_progress=seen.append)
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
    from merge_cli.conversion import pickles

    whole, calls = pickles._in_a_process, []

    def once(job: Any, file: Path, *rest: Any) -> Any:
        calls.append(file.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(job, file, *rest)

    monkeypatch.setattr(pickles, "_in_a_process", once)
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
    done = cli("plan", recipe)
    assert done.returncode == 3
    assert "merge-cli convert m converted" in " ".join(done.stderr.split())
    done = cli("convert", "--json", folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == len(tensors())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are converted in this process: what is tested is what becomes of them."""
    from merge_cli.conversion import pickles

    def answer(job: Any, file: Path, target: Path, seen: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(json.dumps(list(seen))))
            return child.main(str(file), str(target), "0", job.copies)

    monkeypatch.setattr(pickles, "_in_a_process", answer)


quick = pytest.mark.usefixtures("here")


def parts_of(own: dict[str, torch.Tensor], count: int = 2) -> list[Any]:
    return [{name: own[name] for name in sorted(own)[i::count]} for i in range(count)]


def stop_after_one(folder: Path, out: Path, **options: Any) -> None:
    """A conversion that is stopped when its first file is done."""
    from merge_cli.conversion import pickles

    whole, calls = pickles._in_a_process, []

    def once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickles, "_in_a_process", once)
        with pytest.raises(Interrupted):
            convert(str(folder), out, **options)


def same(folder: Path, own: dict[str, torch.Tensor]) -> bool:
    read = read_model(folder)
    return read.keys() == own.keys() and all(torch.equal(read[n], own[n]) for n in own)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@quick
@pytest.mark.parametrize("where", [".", "m", "..", "m/pytorch_model.bin"])
def test_overwrite_takes_nothing_that_is_needed(tmp_path: Path, where: str) -> None:
    (tmp_path / "parent").mkdir()
    folder = write(tmp_path / "parent" / "m", [tensors()])
    (tmp_path / "parent" / "model.safetensors").write_bytes(b"looks like a model")
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=r"would replace|is a file"):
        convert(str(folder), tmp_path / "parent" / where, overwrite=True)
    assert everything(tmp_path) == before


@quick
def test_overwrite_replaces_models_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [tensors()])
    for name, files in {
        "photos": ["cat.jpg"], "settings": ["config.json", "photo.jpg"],
        "project": ["config.json", "model.safetensors", "src/main.py"],
        "clone": ["model.safetensors", ".git/objects/ab"],
    }.items():  # fmt: skip
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(file)
        before = everything(tmp_path / name)
        with pytest.raises(UsageError, match="will not be replaced"):
            convert(str(folder), tmp_path / name, overwrite=True)
        assert everything(tmp_path / name) == before
    convert(str(folder), tmp_path / "out")
    (tmp_path / "out" / "additional_chat_templates").mkdir()
    (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").write_text("x")
    convert(str(folder), tmp_path / "out", overwrite=True)
    assert same(tmp_path / "out", tensors())


@quick
def test_another_model_where_a_conversion_has_stopped(tmp_path: Path) -> None:
    own = tensors()
    other = {name: value * 2 for name, value in own.items()}
    first = write(tmp_path / "a", parts_of(own))
    second = write(tmp_path / "b", parts_of(other))
    stop_after_one(first, tmp_path / "out")
    with pytest.raises(UsageError, match="an interrupted conversion of another"):
        convert(str(second), tmp_path / "out")
    convert(str(second), tmp_path / "out", fresh=True)
    assert same(tmp_path / "out", other)


@quick
def test_other_content_at_the_same_place(tmp_path: Path) -> None:
    own = tensors()
    other = {name: value * 2 for name, value in own.items()}
    folder = write(tmp_path / "a", parts_of(own))
    stop_after_one(folder, tmp_path / "out")
    for file in write(tmp_path / "b", parts_of(other)).glob("*.bin"):
        stamp = (folder / file.name).stat()
        os.replace(file, folder / file.name)
        os.utime(folder / file.name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(UsageError, match="--fresh"):
        convert(str(folder), tmp_path / "out")
    convert(str(folder), tmp_path / "out", fresh=True)
    assert same(tmp_path / "out", other)


@quick
def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    from merge_cli.conversion import pickles

    own = tensors()
    folder = write(tmp_path / "a", parts_of(own))
    whole = pickles._in_a_process

    def change(*arguments: Any) -> Any:
        found = whole(*arguments)
        first = sorted(folder.glob("*.bin"))[0]
        first.write_bytes(first.read_bytes())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickles, "_in_a_process", change)
        with pytest.raises(SourceError, match=r"pytorch_model-00001-of-00002\.bin"):
            convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(str(folder), tmp_path / "out")
    assert same(tmp_path / "out", own)


@quick
@pytest.mark.parametrize("content", [["letter.txt"], ["model/letter.txt"], ["journal.jsonl"]])
def test_a_folder_of_the_users_beside_out(tmp_path: Path, content: list[str]) -> None:
    folder = write(tmp_path / "m", [tensors()])
    for name in content:
        (tmp_path / "out.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out.partial" / name).write_text("mine")
    before = everything(tmp_path / "out.partial")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="is not an unfinished conversion"):
            convert(str(folder), tmp_path / "out", fresh=fresh, overwrite=True)
    assert everything(tmp_path / "out.partial") == before


@quick
def test_the_unfinished_work_of_a_merge(tmp_path: Path) -> None:
    from merge_cli.engine.journal import Journal
    from merge_cli.engine.merge_stats import TensorStats
    from merge_cli.engine.output import OutputWorkspace

    folder = write(tmp_path / "m", [tensors()])
    with OutputWorkspace(tmp_path / "out") as work:
        work.begin("a merge")
        journal = Journal(work.journal, "a merge")
        journal.record([(0, TensorStats(count=1))])
        journal.close()
    before = everything(tmp_path / "out.partial")
    with pytest.raises(UsageError, match="is in the way"):
        convert(str(folder), tmp_path / "out")
    assert everything(tmp_path / "out.partial") == before
    convert(str(folder), tmp_path / "out", fresh=True)
    assert same(tmp_path / "out", tensors())


@quick
@pytest.mark.parametrize("cut", [1, 40, 200, -1, -30])
def test_a_torn_record_is_work_to_do_again(tmp_path: Path, cut: int) -> None:
    own = tensors()
    folder = write(tmp_path / "m", parts_of(own))
    stop_after_one(folder, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    whole = journal.read_bytes()
    if cut < 0:
        journal.write_bytes(whole[:cut])
    else:
        journal.write_bytes(whole[:cut] + bytes([whole[cut] ^ 4]) + whole[cut + 1 :])
    convert(str(folder), tmp_path / "out")
    assert same(tmp_path / "out", own)
    assert not (tmp_path / "out.partial").exists()


@quick
def test_killed_between_the_renames(tmp_path: Path) -> None:

    own = tensors()
    folder = write(tmp_path / "m", [own])
    out = convert(str(folder), tmp_path / "out").path
    rename = os.rename

    def once(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == "replaced":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", once)
        with pytest.raises(Interrupted):
            convert(str(folder), out, overwrite=True)
    assert not out.exists()
    with pytest.raises(UsageError, match="exists already"):
        convert(str(folder), out)
    assert same(out, own)  # put back
    convert(str(folder), out, overwrite=True)
    assert same(out, own)
    assert not (tmp_path / "out.partial").exists()


def test_killed_while_replacing(tmp_path: Path) -> None:
    """SIGKILL at several moments: OUT is the old model or the new one, and the end is right."""
    old = {name: value * 3 for name, value in tensors().items()}
    out = convert(str(write(tmp_path / "old", [old])), tmp_path / "out").path
    own = tensors()
    folder = write(tmp_path / "new", parts_of(own, 3))
    command = [sys.executable, "-m", "merge_cli", "convert", str(folder), str(out), "--overwrite"]
    for goal in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            if len(list((tmp_path / "out.partial" / "model").glob("*.safetensors"))) >= goal:
                process.kill()
            time.sleep(0.002)
        process.communicate()
        if out.exists():
            assert same(out, old) or same(out, own)
    subprocess.run(command, check=True, capture_output=True)
    assert same(out, own)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "out"]


@quick
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin.index.json", b"{"),
        ("pytorch_model.bin.index.json", b"[1, 2]"),
        ("pytorch_model.bin.index.json", b'{"weight_map": 3}'),
        ("pytorch_model.bin.index.json", b'{"weight_map": {"a": null}}'),
        ("pytorch_model.bin.index.json", b'{"weight_map": {"a": "../../etc/passwd"}}'),
        ("pytorch_model.bin.index.json", b"[" * 10_000),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"7"),
        ("config.json", b'{"text_config": [], "tie_word_embeddings": {}'),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write(tmp_path / "m", [tensors()])
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=r"index|config"):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@quick
def test_a_file_is_converted_with_the_config_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [tensors()])
    found = convert(str(folder / "pytorch_model.bin"), tmp_path / "out")
    assert read_model(found.path).keys() == tensors().keys()
    hf.LlamaForCausalLM.from_pretrained(found.path)
    with pytest.raises(SourceError, match="not a folder, and not a file of weights"):
        convert(str(folder / "config.json"), tmp_path / "no")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "does not begin as files of torch do"),
        (None, "its end is missing"),
    ],
)
def test_what_is_no_file_of_torchs_has_no_code_to_run(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    folder = write(tmp_path / "m", [tensors()])
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(SourceError, match=words):
        convert(str(folder), tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="limits are inherited by children")
def test_a_disk_that_is_full_is_no_fault_of_the_input(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [tensors()])
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 8; exec "$@"', "sh", sys.executable, "-m", "merge_cli",
         "convert", str(folder), str(tmp_path / "out")],
        capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT),
                          "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "the disk is full" in done.stderr
    assert str(tmp_path / "out.partial" / "model" / "model.safetensors") in done.stderr
    convert(str(folder), tmp_path / "out")
