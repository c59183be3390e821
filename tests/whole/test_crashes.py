"""What nobody has foreseen: one sentence, a file with the traceback, and the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from merge_cli.cli.streams import as_merge_cli_error
from merge_cli.errors import MergeCliError, ResourceError, SourceError, UnexpectedError
from tests.support.command import failed
from tests.support.tiny import Family


def crash(
    raised: str, recipe: Path, *before: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`merge-cli plan` in which the planner raises that."""
    code = (
        "import sys\nfrom merge_cli.planning import stages\n"
        f"def broken(*_, **__):\n    {raised}\n"
        "stages.plan_recipe = broken\n"
        "from merge_cli.cli import main\nsys.argv[0] = 'merge-cli'\nmain()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *before, "plan", str(recipe)],
        capture_output=True, text=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip


def test_one_sentence_and_a_file(family: Family, tmp_path: Path) -> None:
    raised = "raise KeyError('a tensor\\x1b[2J hf_abcdefghijkl')"
    done = crash(raised, family.recipe("ties"), TMPDIR=str(tmp_path))
    failed(done, 1, "Unexpected error: KeyError: 'a tensor\\x1b[2J", "Please report it")
    assert done.stderr.count("\n") == 1
    [file] = tmp_path.glob("merge-cli-error-*.txt")
    assert str(file) in done.stderr
    said = file.read_text()
    for word in ("Traceback", "in broken", "KeyError", "merge-cli plan", "python"):
        assert word in said
    assert "abcdefghijkl" not in said + done.stderr  # a token of the Hub
    assert file.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("how", ["--debug", "MERGE_CLI_DEBUG"])
def test_debug_prints_the_traceback(family: Family, tmp_path: Path, how: str) -> None:
    flags, variables = (("--debug",), {}) if how == "--debug" else ((), {how: "1"})
    done = crash("raise KeyError('x')", family.recipe("ties"), *flags,
                 TMPDIR=str(tmp_path), **variables)  # fmt: skip
    assert done.returncode == 1
    assert "in broken" in done.stderr
    assert "Unexpected error: KeyError" in done.stderr
    off = crash("raise KeyError('x')", family.recipe("ties"),
                TMPDIR=str(tmp_path), MERGE_CLI_DEBUG="0")  # fmt: skip
    assert "in broken" not in off.stderr


def test_nothing_can_be_written(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", _refuse)
    known = as_merge_cli_error(KeyError("x"))
    assert isinstance(known, UnexpectedError)
    assert "Traceback" not in str(known) or "KeyError" in str(known)
    assert "what follows" in known.hint
    assert "KeyError" in known.hint


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError(), ResourceError, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceError, "memory"),
        (RuntimeError("can't start new thread"), ResourceError, "threads"),
        (RecursionError("maximum recursion depth"), SourceError, "nests too deeply"),
        (OSError(28, "No space left on device", "/x/y"), ResourceError, "the disk is full — /x/y"),
        (OSError(24, "Too many open files"), ResourceError, "ulimit -n"),
        (OSError(30, "Read-only file system", "/x"), ResourceError, "can only be read"),
        (BlockingIOError(11, "Resource temporarily unavailable"), ResourceError, "processes"),
        (PermissionError(13, "Permission denied", "/x"), ResourceError, "/x"),
    ],
)
def test_what_the_machine_refuses(error: Exception, kind: type[MergeCliError], words: str) -> None:
    known = as_merge_cli_error(error)
    assert type(known) is kind
    assert words in str(known)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("raise MemoryError", 4),
        ("broken()", 3),
        ('raise RuntimeError("can\'t start new thread")', 4),
    ],
)
def test_exit_codes(family: Family, tmp_path: Path, raised: str, code: int) -> None:
    failed(crash(raised, family.recipe("ties"), TMPDIR=str(tmp_path)), code)
    assert not list(tmp_path.glob("merge-cli-error-*"))
