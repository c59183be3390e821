"""docs/running.md: its batch script works, and its packages are those of pyproject.toml."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.documents import blocks
from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PAGE = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")


def requirements() -> dict[str, str]:
    """What a merge without torch needs: package -> the requirement, without markers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plain = [text.partition(";")[0].strip() for text in project["dependencies"]]
    names = {re.split(r"[<>=]", text)[0]: text for text in plain}
    return {name: text for name, text in names.items() if name not in ("torch", "transformers")}


def test_the_packages_for_merging_alone_are_the_projects() -> None:
    (line,) = re.findall(r"^pip install (cma .*)$", PAGE, flags=re.MULTILINE)
    assert line.split() == list(requirements())
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r'"([a-z_0-9]+>=[\d.]+)"', image) == list(requirements().values())


def test_the_image_gets_what_it_is_built_from() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", image, flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert names == set(re.findall(r"^!(.+)$", kept, flags=re.MULTILINE))
    assert all((ROOT / name).exists() for name in names)
    assert re.search(r"^USER (?!root)", image, flags=re.MULTILINE)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The batch script, with commands that note how they are called."""
    (text,) = [block for block in blocks("bash", PAGE) if "#SBATCH" in block]
    path = tmp_path / "merge.sh"
    path.write_text(text, encoding="utf-8")
    commands = {
        "merge-cli": "trap 'exit 130' TERM; echo started > started; for i in $(seq $LONG); do "
        "sleep 0.05; done; exit $CODE",
        "scontrol": 'echo "$@" > scontrol.called',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        command.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    return path


def start(script: Path, *, long: int, code: int) -> subprocess.Popen[bytes]:
    path = f"{script.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    settings = {"SLURM_SUBMIT_DIR": str(script.parent), "SLURM_JOB_ID": "7", "PATH": path}
    settings |= {"LONG": str(long), "CODE": str(code)}
    return subprocess.Popen(["bash", str(script)], env={**os.environ, **settings})


@pytest.mark.parametrize("code", [0, 3])
def test_the_batch_script_ends_as_the_merge_does(script: Path, code: int) -> None:
    assert start(script, long=1, code=code).wait(30) == code
    assert not (script.parent / "scontrol.called").exists()


def test_the_batch_script_requeues_a_merge_that_was_stopped(script: Path) -> None:
    process = start(script, long=400, code=0)
    while not (script.parent / "started").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    called = (script.parent / "scontrol.called").read_text(encoding="utf-8")
    assert called == "requeue 7\n"
