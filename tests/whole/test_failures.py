"""What goes wrong, as a user meets it: one message, the right exit code, nothing half done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import merge_cli
from merge_cli.engine.files import Files
from merge_cli.errors import CorruptFileError, NonFiniteError, ResourceError, SourceError
from merge_cli.kernels import compiled
from tests.support.command import cli, failed
from tests.support.tiny import Family, llama_config, llama_family, read_model, write_model


def break_file(family: Family, keep: int) -> Path:
    path = family.folder / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    return path


def test_truncated_shard(family: Family, tmp_path: Path) -> None:
    break_file(family, -100)
    done = cli("run", family.recipe("ties"), tmp_path / "out")
    failed(done, 3, "truncated: the last 100 bytes", "a, model.safetensors, model.layers.3.self")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_source_that_shrinks_after_the_plan(family: Family, tmp_path: Path) -> None:
    plan = merge_cli.plan(family.recipe("ties"))
    break_file(family, -100)
    with pytest.raises(SourceError, match="has changed since"):
        merge_cli.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_that_vanishes_after_the_plan(family: Family, tmp_path: Path) -> None:
    plan = merge_cli.plan(family.recipe("ties"))
    (family.folder / "b" / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="No such file") as raised:
        merge_cli.merge(plan, tmp_path / "out")
    assert raised.value.model == "b"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["soup", "ties", "dare"])
@pytest.mark.parametrize("arithmetic", ["compiled", "torch"])
def test_non_finite_source(
    family: Family, tmp_path: Path, method: str, bad: float, arithmetic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if arithmetic == "torch":
        monkeypatch.setattr(compiled, "available", lambda: "switched off")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = read_model(family.folder / "b")
    tensors[name].view(-1)[77] = bad
    write_model(family.folder / "b", tensors, llama_config())
    recipe = family.recipe(method, base=method != "soup")
    with pytest.raises(NonFiniteError, match="first at element 77") as raised:
        merge_cli.merge(recipe, tmp_path / "out")
    assert (raised.value.model, raised.value.tensor) == ("b", name)
    options = merge_cli.MergeOptions(allow_non_finite=True)
    report = merge_cli.merge(recipe, tmp_path / "out", options=options).report
    counts = {t["name"]: t["non_finite"] for t in report["tensors"]}
    assert counts[name] == 1
    assert sum(counts.values()) == 1


def test_non_finite_base_is_named(family: Family, tmp_path: Path) -> None:
    tensors = read_model(family.folder / "base")
    tensors["model.norm.weight"][3] = float("nan")
    write_model(family.folder / "base", tensors, llama_config())
    with pytest.raises(NonFiniteError) as raised:
        merge_cli.merge(family.recipe("ties"), tmp_path / "out")
    assert raised.value.model == "base"


def test_large_but_finite_values_are_fine(tmp_path: Path) -> None:
    """Squares that overflow float32 are no reason to refuse a model."""
    for name in ("a", "b"):
        write_model(tmp_path / name, {"w": torch.full((10,), 1e30)})
    (tmp_path / "r.yaml").write_text("merge_method: soup\nmodels: [a, b]\n")
    merge_cli.merge(tmp_path / "r.yaml", tmp_path / "out")
    assert read_model(tmp_path / "out")["w"].tolist() == pytest.approx([1e30] * 10)


def test_disk_that_fills_up(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC in the middle: the journal stays, and the same call resumes when there is room."""
    calls = 0
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    recipe = family.recipe("ties")
    with monkeypatch.context() as patch:
        # Loops that write by themselves leave to Python what they cannot write.
        patch.setattr(Files, "on_disk", False)
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError, match="the disk is full") as raised:
            merge_cli.merge(recipe, tmp_path / "out")
    assert "resumes" in raised.value.hint
    assert not (tmp_path / "out").exists()
    report = merge_cli.merge(recipe, tmp_path / "out").report
    assert report["cost"]["resumed_bytes"] > 0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_really_full_disk(family: Family, tmp_path: Path) -> None:
    """A limit on file size is the nearest thing to a full disk that needs no root."""
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); " \
        "sys.argv[0] = 'merge-cli'; from merge_cli.cli import main; main()"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", limit, "run", str(family.recipe("ties")), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    failed(done, 4, "the disk is full")


def test_unwritable_target(family: Family, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("run", family.recipe("soup", base=False), tmp_path / "file" / "out")
    failed(done, 4, "cannot be written")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(family: Family, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    done = cli("run", family.recipe("soup", base=False), tmp_path / "closed" / "out")
    failed(done, 4, "cannot be written")


def test_existing_target(family: Family, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    done = cli("run", family.recipe("soup", base=False), tmp_path / "out")
    failed(done, 2, "exists already", "--overwrite")
    assert (tmp_path / "out" / "x").read_text() == "mine"


def test_missing_model_and_missing_cuda(family: Family, tmp_path: Path) -> None:
    recipe = family.write("merge_method: soup\nmodels: [a, ./nowhere]\n")
    failed(cli("run", recipe, tmp_path / "out"), 3, "no such folder", "./nowhere")
    if not torch.cuda.is_available():
        recipe = family.recipe("soup", base=False)
        done = cli("run", recipe, tmp_path / "out", "--device", "cuda:0")
        failed(done, 4, "0 CUDA devices found")


# Signals. The family is large enough that a merge takes a second or two.


@pytest.fixture(scope="module")
def slow_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("slow")
    generator = torch.Generator().manual_seed(0)
    config = llama_config(layers=24)
    family = llama_family(folder, layers=24)
    for name in ("base", "a", "b", "c"):
        tensors = read_model(folder / name)
        for i in range(24):
            wide = torch.randn(1024, 1024, generator=generator) * 0.02
            tensors[f"model.layers.{i}.mlp.wide_proj.weight"] = wide.bfloat16()
        write_model(folder / name, tensors, config)
    return family


@pytest.fixture(scope="module")
def expected(slow_family: Family) -> bytes:
    merge_cli.merge(
        slow_family.recipe("ties", parameters={"density": 0.5}), slow_family.folder / "e"
    )
    return (slow_family.folder / "e" / "model.safetensors").read_bytes()


def start(family: Family, out: Path) -> subprocess.Popen[str]:
    recipe = family.recipe("ties", parameters={"density": 0.5})
    return subprocess.Popen(
        [sys.executable, "-m", "merge_cli", "run", str(recipe), str(out), "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_lines(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until the journal has so many lines of chunks, or the process has ended."""
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b'"chunks"') >= count:
            return
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_politely(
    slow_family: Family, expected: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(slow_family, out)
    wait_for_lines(process, out, 4)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "The same command resumes" in err
    assert "Traceback" not in err
    assert not out.exists()
    process = start(slow_family, out)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (out / "model.safetensors").read_bytes() == expected
    assert not out.with_name("out.partial").exists()


def kill_until_done(family: Family, expected: bytes, folder: Path, seed: int, kills: int) -> None:
    """SIGKILL at random moments, any stage from start-up to publication, then resume."""
    chance = random.Random(seed)
    out = folder / f"out{seed}"
    killed = 0
    for _ in range(kills):
        process = start(family, out)
        if chance.random() < 0.8:
            wait_for_lines(process, out, chance.randrange(16))
            time.sleep(chance.random() * 0.01)
        else:
            time.sleep(chance.random() * 0.6)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if out.exists():
            break
    else:
        process = start(family, out)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert killed
    assert (out / "model.safetensors").read_bytes() == expected
    assert {p.name for p in out.iterdir()} >= {"config.json", "merge_report.json", "README.md"}


def test_killed_and_resumed(slow_family: Family, expected: bytes, tmp_path: Path) -> None:
    kill_until_done(slow_family, expected, tmp_path, seed=0, kills=4)


@pytest.mark.slow
def test_killed_fifty_times_and_resumed(
    slow_family: Family, expected: bytes, tmp_path: Path
) -> None:
    for seed in range(1, 18):
        kill_until_done(slow_family, expected, tmp_path, seed=seed, kills=3)


def test_a_folder_that_may_not_be_read(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(SourceError, match="cannot be read: Permission denied — a"):
        merge_cli.plan(family.recipe("soup", base=False))
