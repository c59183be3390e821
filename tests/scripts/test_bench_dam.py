"""The script that measures DAM still runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("what", ["speed", "memory"])
def test_the_benchmark_runs(what: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_dam.py"), what, "--shape", "tiny",
               "--rows", "1", "--length", "32", "--rounds", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert "| disk |" in done.stdout
    assert "| host |" in done.stdout
