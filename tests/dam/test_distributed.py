"""Two processes with gloo on a CPU against one: the same coefficients, and what was sent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge_cli
from merge_cli.options import MergeOptions
from tests.support.dam_tiny import config, write_data, write_models, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TRAINING: dict[str, Any] = {
    "max_steps": 4, "max_length": 24, "batch_size": 3, "learning_rate": 0.02, "top_k": 16,
    "evaluate_every": 2, "mode": "two_pass",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run_together(recipe: Path, out: Path, count: int) -> list[subprocess.CompletedProcess[str]]:
    """What torchrun does: the same command `count` times with a rank each."""
    port = str(free_port())
    running = []
    for rank in range(count):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [sys.executable, "-m", "merge_cli", "run", "--device", "cpu", "--threads", "1",
                   str(recipe), str(out)]  # fmt: skip
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        running.append(process)
    done = []
    for process in running:
        out_text, err_text = process.communicate(timeout=180)
        done.append(
            subprocess.CompletedProcess(process.args, process.returncode, out_text, err_text)
        )
    return done


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    write_models(tmp_path, config("llama"), change=0.3)
    write_data(tmp_path)
    return write_recipe(tmp_path, TRAINING)


@pytest.mark.parametrize("whole", [False, True])
def test_two_processes_are_one(recipe: Path, tmp_path: Path, whole: bool) -> None:
    found, reports = [], []
    if whole:  # the first process makes the merge that both start from
        about = {**TRAINING, "preset": "default", "start": "fisher", "keep": "last"}
        recipe = write_recipe(tmp_path, about)
    merge_cli.merge(recipe, tmp_path / "out1", options=MergeOptions(device="cpu", threads=1))
    done = run_together(recipe, tmp_path / "out2", 2)
    assert all(one.returncode == 0 for one in done), done[0].stderr + done[-1].stderr
    assert "train 4/4 steps" in done[0].stderr
    assert done[1].stdout == done[1].stderr == ""  # the first one speaks for both
    for count in (1, 2):
        found.append(load_file(tmp_path / f"out{count}" / "coefficients.safetensors"))
        report = (tmp_path / f"out{count}" / "merge_report.json").read_text()
        reports.append(json.loads(report)["training"])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, torch.full_like(value, 0.0 if whole else 1 / 3))
    one, two = reports
    assert one["cost"]["bytes_reduced"] == 0
    assert two["cost"]["processes"] == 2
    assert one["cost"]["tokens"] == two["cost"]["tokens"]  # of all processes
    assert two["cost"]["bytes_reduced"] == 4 * 4 * two["coefficients"]  # steps, float32
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert one["scores"]["uniform soup"] == {
        key: pytest.approx(value, rel=1e-5) for key, value in two["scores"]["uniform soup"].items()
    }


@pytest.mark.slow
def test_under_torchrun(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(free_port()), "-m", "merge_cli", "run", "--device", "cpu",
               str(recipe), str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
