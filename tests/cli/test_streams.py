"""stdout and stderr that are closed, full, or not UTF-8; names that a terminal would obey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from merge_cli.console import plain, print_json
from tests.support.command import cli, failed
from tests.support.tiny import Family, llama_config, write_model

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`line` in a shell, in which `$M` is merge-cli."""
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, errors="replace", timeout=120,
        env=os.environ | {"M": f"{sys.executable} -m merge_cli"} | environment,
    )  # fmt: skip


@needs_full
def test_a_full_stdout(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("ties")
    words = "the result cannot be written to stdout: No space left on device"
    for verb in (f"plan {recipe}", f"plan {recipe} --json", "methods", "methods ties --json"):
        failed(shell(f"$M {verb} > /dev/full"), 4, words)
    done = shell(f"$M run {recipe} {tmp_path}/out > /dev/full")
    failed(done, 4, words, "What the command has written to files is complete")
    assert (tmp_path / "out" / "merge_report.json").is_file()
    done = shell(f"$M run {recipe} {tmp_path}/quiet --quiet > /dev/full")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("ties")
    failed(shell(f"$M plan {recipe} >&-"), 4, "the result cannot be written to stdout")
    done = shell(f"$M run {recipe} {tmp_path}/out --quiet >&- 2>&- <&-")
    assert done.returncode == 0
    whole = shell(f"$M run {recipe} {tmp_path}/again --quiet")
    assert whole.returncode == 0, whole.stderr
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]  # nobody has printed into a file that got the number 1


@needs_full
def test_a_stderr_that_cannot_be_written(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("soup", base=False, parameters={"int8_mask": True})  # a note
    for number, stderr in enumerate(("2>/dev/full", "2>&-")):
        done = shell(f"$M run {recipe} {tmp_path}/out{number} {stderr}")
        assert done.returncode == 0
        assert "merged" in done.stdout
    assert shell(f"$M run {recipe} {tmp_path}/out0 2>/dev/full").returncode == 2


def test_a_reader_that_goes(family: Family) -> None:
    done = shell(f"$M plan {family.recipe('ties')} --all --json | head -c 1")
    assert (done.stdout, done.stderr) == ("{", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode(family: Family, tmp_path: Path, encoding: str) -> None:
    tensors = {f"größe.{i}.重み": t for i, t in enumerate(family.base.values())}
    write_model(family.folder / "a", tensors, llama_config())
    recipe = family.write("merge_method: passthrough\nmodels: [a]\nmetadata: {title: 合併}\n")
    done = shell(f"$M run {recipe} {tmp_path}/合併", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "? merged" in done.stdout
    shown = shell(f"$M plan {recipe} --all", PYTHONIOENCODING=encoding)
    assert shown.returncode == 0, shown.stderr
    made = shell(f"$M plan {recipe} --json", PYTHONIOENCODING=encoding)
    assert "größe.0.重み" in [t["name"] for t in json.loads(made.stdout)["tensors"]]
    failed(shell(f"$M plan {tmp_path}/無い.yaml", PYTHONIOENCODING=encoding), 2, "\\u7121")


def test_a_locale_without_unicode(family: Family, tmp_path: Path) -> None:
    recipe = family.write("merge_method: soup\nmodels: [a, b]\nmetadata: {title: 合併 größer}\n")
    done = shell(
        f"$M run {recipe} {tmp_path}/out", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert done.returncode == 0, done.stderr
    assert "合併 größer" in (tmp_path / "out" / "merge_recipe.yaml").read_text(encoding="utf-8")


HOSTILE = "a\x1b[2J\x1b]0;owned\x07\x9b31m\u202eb\r"


def test_plain_leaves_text_alone() -> None:
    assert plain("größer, 合併 ✓\n\tнет") == "größer, 合併 ✓\n\tнет"
    assert plain(HOSTILE) == r"a\x1b[2J\x1b]0;owned\x07\x9b31m\u202eb\r"
    assert plain("\udc80\x00\x7f") == r"\udc80\x00\x7f"


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    document = {HOSTILE: ["合併", "\U0001f600", "\udc80"]}
    print_json(json.dumps(document, ensure_ascii=False, indent=1))
    written = capsys.readouterr().out
    assert "\x1b" not in written
    assert "\x9b" not in written
    assert json.loads(written) == document


def test_terminal_escapes_of_inputs_are_never_printed_raw(family: Family, tmp_path: Path) -> None:
    tensors = {f"{name}{HOSTILE}": tensor for name, tensor in family.base.items()}
    write_model(family.folder / "a", tensors, llama_config())
    recipe = family.write("merge_method: soup\nmodels: [a, b]\n")
    bad = family.folder / f"r{HOSTILE}.yaml"
    bad.write_text("merge_method: soup\nmodels: [a]\nsoup: 1\n")
    for arguments in (
        ("plan", recipe),  # problems
        ("plan", bad),
        ("run", bad, tmp_path / "out", f"--no{HOSTILE}"),  # what click says
        ("evaluate", HOSTILE, "--data", bad),
        ("plan", family.write("merge_method: passthrough\nmodels: [a]\n"), "--all"),
        ("plan", recipe, "--all", "--json"),
    ):
        done = cli(*arguments)
        for character in "\x1b\x07\x9b\u202e\r":
            assert character not in done.stdout + done.stderr, arguments
