"""The first run on a machine says that it compiles; later ones load, and say nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOAD = "from merge_cli.kernels import compiled; compiled.not_empty.load(); compiled.find_tie.load()"


def stderr_of(cache: Path) -> str:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_compiling_is_said_once_and_loading_is_not(tmp_path: Path) -> None:
    first = stderr_of(tmp_path)
    assert first.count("compiling loops for this machine") == 1
    assert len(first.splitlines()) == 1
    assert stderr_of(tmp_path) == ""
