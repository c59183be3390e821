"""What is left to no search for cycles, and when."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import gc
{loaded}
from merge_cli.system.garbage import keep_to_the_end
keep_to_the_end()
print(gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(("loaded", "kept"), [("", "True"), ("import torch, triton", "False")])
def test_libraries_that_print_what_is_left_of_them_are_searched(loaded: str, kept: str) -> None:
    if loaded:
        pytest.importorskip("triton")
    program = _PROGRAM.format(loaded=loaded)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == (f"{kept}\n", "", 0)
