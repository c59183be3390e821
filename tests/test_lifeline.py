"""No child outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import Family

from merge_cli.comparison.cost import CostLog, run_merge
from merge_cli.system import processes as lifeline

SLEEPER = "import pathlib, os, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
STUCK = "import time; time.sleep(60)\n"
PARENT = """
import sys
from merge_cli.system import processes as lifeline
with lifeline.child("sleeper", [sys.argv[1]]) as process:
    process.wait()
"""


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            return True
        time.sleep(0.02)
    return False


def wait_for(file: Path) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.01)
    raise AssertionError("it has not begun")


@pytest.mark.parametrize("kernel", [True, False])
def test_killed_with_its_parent(tmp_path: Path, kernel: bool) -> None:
    """By the kernel's signal, and where there is none (macOS) by the pipe."""
    without = "" if kernel else "from merge_cli.system import processes as lifeline\n"
    (tmp_path / "sleeper.py").write_text(without + SLEEPER + STUCK)
    if not kernel:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.platform = 'other'\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "pid")],
        env={**os.environ, "PYTHONPATH": path},
    )
    child = wait_for(tmp_path / "pid")
    assert not gone(child, 0.1)
    parent.kill()
    parent.wait()
    assert gone(child)


COMPARING = """
import sys
from pathlib import Path
from merge_cli.comparison.cost import CostLog, run_merge
run_merge(Path(sys.argv[1]), Path(sys.argv[2]), [], CostLog(Path(sys.argv[3])))
"""


def test_a_comparison_that_is_killed_and_run_again_at_once(family: Family, tmp_path: Path) -> None:
    """What its merge has left is waited for; what is finished is accepted."""
    recipe, out, costs = family.recipe("ties"), tmp_path / "out", tmp_path / "costs.jsonl"
    lock = tmp_path / "out.partial.lock"
    parent = subprocess.Popen(
        [sys.executable, "-c", COMPARING, str(recipe), str(out), str(costs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    until = time.monotonic() + 100
    began = 0  # the parent itself holds the lock for a moment
    while began < 20 and parent.poll() is None and time.monotonic() < until:
        began = began + 1 if lock.exists() else 0
        time.sleep(0.002)
    parent.kill()
    parent.wait()
    for _ in range(2):
        run_merge(recipe, out, [], CostLog(costs))
        assert (out / "model.safetensors").exists()
    assert not list(tmp_path.glob("out.partial*"))


def test_a_child_that_ends_by_itself(tmp_path: Path) -> None:
    options = {"stdout": subprocess.PIPE, "text": True}
    with lifeline.child("platform", [], **options) as process:
        said, _ = process.communicate()
    assert said.strip()
    assert process.returncode == 0


def test_leaving_with_an_exception_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER + STUCK)
    monkeypatch.syspath_prepend(tmp_path)  # children get it from here
    started = []

    def leave() -> None:
        with lifeline.child("sleeper", [str(tmp_path / "pid")]) as process:
            started.append(process)
            wait_for(tmp_path / "pid")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert started[0].returncode == -signal.SIGKILL


def test_modules_of_the_working_directory_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` looks there first, and it may be a model's folder."""
    code, here = tmp_path / "code", tmp_path / "model"
    code.mkdir()
    here.mkdir()
    (code / "job.py").write_text("import colorsys, sys\nprint(colorsys.__file__, sys.argv[1:])\n")
    (here / "colorsys.py").write_text("raise SystemExit('run from the working directory')\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(code), "", *sys.path])
    with lifeline.child("job", ["x"], stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    assert out.rstrip().endswith("['x']")
