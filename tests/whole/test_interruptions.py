"""Ctrl-C in every long phase: the process answers within seconds, with the code 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from merge_cli.checkpoint.fingerprint import cached_fingerprint
from tests.support.dam_tiny import config, write_data, write_models
from tests.support.hub_server import HubServer
from tests.support.paths import ROOT
from tests.support.sparse import write_sparse
from tests.support.tiny import llama_config, write_model

# A second on an idle machine; tests share theirs. What is interrupted would take minutes.
PATIENCE = 30.0
SLOW = """
import pathlib, time
def score(net, tokenizer):
    pathlib.Path(__file__).with_name("begun").touch()
    end = time.monotonic() + 300
    while time.monotonic() < end:
        net(input_ids=tokenizer("a few words", return_tensors="pt").input_ids)
    return 1.0
"""


def interrupted(
    arguments: list[object], begun: Callable[[int], bool], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Start a command, wait until it is at its work, press Ctrl-C; it must end at once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "merge_cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not begun(process.pid):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "it never began"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return subprocess.CompletedProcess([], 130, out, err)


def has_read(pid: int, size: int) -> bool:
    """Whether the process has read so many bytes."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(lines[0].split()[1]) > size


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_models(tmp_path, config())
    write_data(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    tasks = {"tasks": [{"task": "python", "python": "slow.py:score", "name": "slow"}]}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(tasks))
    return tmp_path


def write(folder: Path, document: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


@linux
@pytest.mark.parametrize("verb", ["evaluate", "dam"])
def test_hashing(tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that take minutes to read, in threads that no signal reaches."""
    of = config(hidden_size=16384, intermediate_size=32768, num_hidden_layers=1)
    for name in ("a", "b"):  # 5 GB each, sparse; a recipe's plan wants as much of free disk
        write_sparse(tmp_path / name, of)
    write_data(tmp_path, ("a", "b"))
    arguments: list[object] = ["evaluate", "a", "--data", "a.jsonl"]
    if verb == "dam":
        data = [{"model": name, "data": f"{name}.jsonl"} for name in ("a", "b")]
        recipe = write(tmp_path, {"merge_method": "dam", "models": data,
                                  "training": {"examples": 6, "max_length": 16}})  # fmt: skip
        arguments = ["run", recipe, "out"]
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    interrupted(arguments, lambda pid: has_read(pid, 1_000_000_000), tmp_path)
    assert cached_fingerprint(tmp_path / "a") is None  # it was read in part


def test_fetching(tmp_path: Path) -> None:
    import torch

    model = write_model(tmp_path / "m", {"w": torch.zeros(1_000_000)}, llama_config())
    with HubServer(home=tmp_path / "hf") as hub:
        hub.add("org/m", model)
        recipe = write(tmp_path, {"merge_method": "passthrough", "models": ["org/m"]})
        plan = subprocess.run(
            [sys.executable, "-m", "merge_cli", "plan", str(recipe)], capture_output=True,
            env=hub.env() | {"PYTHONPATH": str(ROOT)}, timeout=120,
        )  # fmt: skip
        assert plan.returncode == 0
        hub.pause = 0.5
        hub.requests.clear()
        done = interrupted(
            ["run", recipe, "out"],
            lambda pid: any(r.cdn and not r.range.endswith("32767") and r.sent > 700_000
                            for r in hub.requests),
            tmp_path, **hub.settings(), HF_HUB_OFFLINE="0",
        )  # fmt: skip
        assert "The same command resumes" in done.stderr
        [partial] = (tmp_path / "hf" / "hub" / "models--org--m" / "blobs").glob("*.incomplete")
        assert partial.stat().st_size > 0


def test_evaluating(models: Path) -> None:
    begun = models / "begun"
    interrupted(["evaluate", "a", "--eval", "eval.yaml"], lambda pid: begun.exists(), models)


@pytest.mark.parametrize("workers", [1, 2])
def test_searching(models: Path, workers: int) -> None:
    recipe = write(models, {
        "merge_method": "evolutionary", "base_model": "base", "models": ["a", "b"],
        "search": {"method": "task_arithmetic", "evaluations": 4, "workers": workers,
                   "parameters": {"weight": {"min": 0.0, "max": 1.0}}},
        "objective": [{"task": "python", "python": "slow.py:score", "name": "slow"}],
    })  # fmt: skip
    interrupted(["run", recipe, "out"], lambda pid: (models / "begun").exists(), models)


def test_comparing(models: Path) -> None:
    """While one of its merges searches, in a process of its own."""
    recipe = write(models, {
        "merge_method": "evolutionary", "base_model": "base", "models": ["a", "b"],
        "search": {"method": "task_arithmetic", "evaluations": 4,
                   "parameters": {"weight": {"min": 0.0, "max": 1.0}}},
        "objective": [{"task": "python", "python": "slow.py:score", "name": "slow"}],
    })  # fmt: skip
    arguments = ["compare", recipe, "--data", "a.jsonl", "--out", "results"]
    interrupted(arguments, lambda pid: (models / "begun").exists(), models)


def test_teaching(models: Path) -> None:
    """A teacher's predictions: nothing of them is kept half done, so nothing is waited for."""
    text = "words " * 20
    rows = "".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i in range(4000))
    (models / "a.jsonl").write_text(rows)
    data = [{"model": name, "data": f"{name}.jsonl"} for name in ("a", "b")]
    recipe = write(models, {"merge_method": "dam", "base_model": "base", "models": data,
                            "training": {"examples": 4000, "max_length": 128}})  # fmt: skip
    cache = models / "cache"
    interrupted(["run", recipe, "out"], lambda pid: any(cache.glob("teachers/*/*.safetensors")),
                models, MERGE_CLI_CACHE=str(cache))  # fmt: skip


PREPARING = "import merge_cli.cli; sys.modules['merge_cli.cli.app'].settle_home = press"
LOADING = "typer.Typer = press"  # which cli/app.py calls


@pytest.mark.parametrize("patch", [PREPARING, LOADING])
def test_before_the_command_begins(patch: str) -> None:
    """While the process prepares itself, or loads its modules: no traceback either."""
    code = f"""
import os, signal, sys, typer
def press(*_, **__): os.kill(os.getpid(), signal.SIGINT)
{patch}
sys.argv = ["merge-cli", "methods"]
from merge_cli.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


def test_an_interruption_in_a_finaliser_is_not_lost() -> None:
    """Python drops what a `__del__` raises; nothing may go on as if nobody had asked."""
    code = (
        "import importlib, sys, time\n"
        "from merge_cli.cli import main\n"
        "module = importlib.import_module('merge_cli.cli.app')\n"
        "class Slow:\n"
        "    def __del__(self):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "def work(**_):\n"
        "    Slow()\n"
        "    time.sleep(60)\n"
        "module.app = work\n"
        "sys.argv = ['merge-cli']\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
