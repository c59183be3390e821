"""Sources that change while they are merged: never a mixture, whatever keeps its size and times."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch

import merge_cli
from merge_cli.checkpoint import fingerprint
from merge_cli.engine import inputs, journal
from merge_cli.engine.inputs import Inputs
from merge_cli.engine.journal import Journal
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.errors import SourceError, UsageError
from merge_cli.planning import chunks as units
from merge_cli.system.records import Records
from tests.support.merges import digest, interrupt, write_recipe
from tests.support.tiny import Family, llama_config, merge, read_model, write_model


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1024)
    monkeypatch.setattr(units, "BLOCK_MULTIPLE", 64)


def exchanged(family: Family, how: str) -> None:
    """Other weights in the same names and shapes."""
    file = family.folder / "a" / "model.safetensors"
    about = file.stat()
    other = {name: tensor * 2 for name, tensor in read_model(family.folder / "a").items()}
    if how == "in place":
        content = write_model(family.folder / "other", other) / "model.safetensors"
        with file.open("r+b") as target:
            target.write(content.read_bytes())
    else:
        write_model(family.folder / "new", other)
        os.replace(family.folder / "new" / "model.safetensors", file)
    if how == "same time":
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_size == about.st_size


def while_merging(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Change something when the tenth chunk is done."""
    real, seen, counting = Journal.record, 0, threading.Lock()

    def record(self: Journal, chunks: Iterable[tuple[int, TensorStats]]) -> None:
        nonlocal seen
        done = list(chunks)
        real(self, done)
        with counting:  # the pool's threads record at the same time
            before, seen = seen, seen + len(done)
        if before < 10 <= seen:
            change()

    monkeypatch.setattr(Journal, "record", record)


@pytest.mark.parametrize("how", ["in place", "new", "same time"])
def test_weights_that_change_meanwhile(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    recipe, out = write_recipe(family, "ties"), tmp_path / "out"
    with monkeypatch.context() as patch:
        while_merging(patch, lambda: exchanged(family, how))
        with pytest.raises(SourceError, match="has changed since") as raised:
            merge(recipe, out)
    assert (raised.value.model, raised.value.file) == ("a", "model.safetensors")
    assert not out.exists()
    merge(recipe, out)  # starts over: nothing of the mixture is continued
    merge(recipe, tmp_path / "expected")
    assert digest(out) == digest(tmp_path / "expected")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "base/model.safetensors", "model_code.py"]
)
def test_other_files_that_decide(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Companions are copied at the end, and were read at the beginning; new ones count, too."""
    file = family.folder / name if "/" in name else family.folder / "base" / name
    with monkeypatch.context() as patch:
        while_merging(patch, lambda: file.write_bytes(b"{}" * 2000))
        with pytest.raises(SourceError, match=file.name):
            merge(write_recipe(family, "ties"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_decide_nothing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("README.md", "notes.txt", "training.log"):
        with monkeypatch.context() as patch:
            while_merging(patch, partial((family.folder / "a" / name).write_text, "x"))
            merge(write_recipe(family, "soup"), tmp_path / name)


def test_coefficients_and_statistics_are_inputs(tmp_path: Path) -> None:
    file = tmp_path / "coefficients.safetensors"
    file.write_bytes(b"1" * 100)
    held = Inputs([], [("coefficients", file)])
    held.verify()
    file.write_bytes(b"2" * 100)
    with pytest.raises(SourceError, match=r"coefficients\.safetensors"):
        held.verify()
    file.unlink()
    with pytest.raises(SourceError, match="No such file"):
        held.verify()


def test_exchanged_between_kill_and_resume(family: Family, tmp_path: Path) -> None:
    """Size and time are the same, as container layers and `rsync -t` leave them."""
    recipe, out = write_recipe(family, "soup"), tmp_path / "out"
    interrupt(recipe, out)
    exchanged(family, "same time")
    with pytest.raises(UsageError, match="other inputs"):
        merge(recipe, out)
    merge(recipe, out, fresh=True)
    merge(recipe, tmp_path / "expected")
    assert digest(out) == digest(tmp_path / "expected")


def test_exchanged_where_no_sample_falls(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples cannot see all of a large file: then its times say that the work is of another."""
    for module in (fingerprint, inputs, journal):
        monkeypatch.setattr(module, "sampled_fingerprint", lambda path: "the same")
    recipe, out = write_recipe(family, "soup"), tmp_path / "out"
    interrupt(recipe, out)
    exchanged(family, "same time")
    assert merge_cli.merge(recipe, out).report["cost"]["resumed_bytes"] == 0
    merge(recipe, tmp_path / "expected")
    assert digest(out) == digest(tmp_path / "expected")


def test_changed_between_plan_and_merge(family: Family, tmp_path: Path) -> None:
    plan = merge_cli.plan(write_recipe(family, "soup"))
    tensors = {"w": torch.ones(3)}
    write_model(family.folder / "a", tensors, llama_config())
    with pytest.raises(SourceError, match="has changed since"):
        merge_cli.merge(plan, tmp_path / "out")


def test_another_tokenizer_is_another_result(family: Family, tmp_path: Path) -> None:
    """A finished OUT is accepted only if its companions are those of now."""
    from merge_cli.engine.made_before import made_before

    tokenizer = family.folder / "base" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({"a": 1}))
    recipe = write_recipe(family, "ties")
    merge(recipe, tmp_path / "out")
    options = merge_cli.MergeOptions()
    assert made_before(merge_cli.plan(recipe), tmp_path / "out", options) is not None
    tokenizer.write_text(json.dumps({"a": 2}))
    assert made_before(merge_cli.plan(recipe), tmp_path / "out", options) is None


@pytest.mark.parametrize("what", ["a", "a/model.safetensors", "a/config.json"])
def test_a_source_that_is_gone_for_a_while(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A network that stops: what is done is kept, for when the source is there as it was."""
    recipe, out = write_recipe(family, "ties"), tmp_path / "out"
    gone = family.folder / what
    with monkeypatch.context() as patch:
        while_merging(patch, lambda: gone.rename(family.folder / "aside"))
        with pytest.raises(SourceError, match="the same command resumes"):
            merge(recipe, out)
    assert Records.count_of(tmp_path / "out.partial" / "journal.jsonl") >= 10
    (family.folder / "aside").rename(gone)
    merge(recipe, out)
    merge(recipe, tmp_path / "expected")
    assert digest(out) == digest(tmp_path / "expected")
