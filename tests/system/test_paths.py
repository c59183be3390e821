"""Paths that are not text, and working directories that are gone, are refused before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import merge_cli
from merge_cli.errors import SourceError, UsageError
from merge_cli.evaluation.rows import read_rows
from merge_cli.options import MergeOptions
from merge_cli.system.paths import require_arguments, require_names, require_text, shown
from tests.support.command import cli, failed
from tests.support.paths import ROOT
from tests.support.tiny import Family

ODD = "d\udcff"  # the byte FF, as Python spells it
SHOWN = r"d\xff"
OPTIONS = MergeOptions(device="cpu", threads=1)


@pytest.fixture
def job(family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models; the folder ODD with a model in it, and links to what is in there."""
    monkeypatch.chdir(family.folder)
    family.recipe("soup", base=False)
    Path(ODD).mkdir()
    os.rename("c", f"{ODD}/c")
    os.rename("recipe.yaml", f"{ODD}/recipe.yaml")
    Path(ODD, "rows.jsonl").write_text('{"text": "a"}\n')
    for name in ("c", "recipe.yaml", "rows.jsonl"):
        Path(name).symlink_to(f"{ODD}/{name}")
    Path("plain.yaml").write_text("merge_method: soup\nmodels: [a, b]\n")
    return family.folder


COMMANDS = {
    "out": ["run", "plain.yaml", ODD + "/out"],
    "recipe": ["run", ODD + "/recipe.yaml", "out"],
    "model": ["evaluate", ODD + "/c", "--data", "rows.jsonl"],
    "option": ["evaluate", "a", "--data", ODD + "/rows.jsonl"],
    "result": ["analyze", "a", "b", "--html", ODD],
    "list": ["init", "--model", "a", "--model", ODD + "/c", "--yes"],
    "text": ["chat", "a", "--system", ODD],
    "comparison": ["compare", "plain.yaml", "--data", "rows.jsonl", "--out", ODD + "/x"],
    "linked recipe": ["plan", "recipe.yaml"],
    "linked model": ["evaluate", "c", "--data", "rows.jsonl"],
    "linked source": ["analyze", "a", "c"],
    "linked base": ["extract-lora", "a", "out", "--base", "c"],
    "linked fine-tune": ["extract-lora", "c", "out", "--base", "a"],
    "linked pickles": ["convert", "c", "out"],
    "linked gguf": ["convert", "c", "out.gguf"],
    "linked out": ["run", "plain.yaml", "linked/out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_is_not_text(job: Path, command: str) -> None:
    if command == "linked out":
        Path("linked").symlink_to(ODD)
    before = sorted(os.listdir(ODD))
    failed(cli(*COMMANDS[command]), 2, "is not UTF-8 text", SHOWN)
    assert sorted(os.listdir(ODD)) == before
    assert not Path("out").exists()
    assert not list(job.glob("*.partial"))


def test_a_working_directory_that_is_not_text(job: Path) -> None:
    failed(cli("plan", job / "plain.yaml", cwd=job / ODD), 2, "working directory", SHOWN)


def test_the_library_refuses_it_too(job: Path) -> None:
    """What no command line has checked."""
    for recipe, out in (("recipe.yaml", "out"), ("plain.yaml", f"{ODD}/out")):
        with pytest.raises(UsageError, match="is not UTF-8 text"):
            merge_cli.merge(recipe, out, options=OPTIONS)
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        merge_cli.compare(["plain.yaml"], "rows.jsonl", f"{ODD}/x")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_rows(Path("rows.jsonl"))


def test_names_in_a_models_folder(job: Path) -> None:
    os.rename("a/model.safetensors", f"a/{ODD}.safetensors")
    failed(cli("plan", "plain.yaml"), 3, "name of a file", f"{SHOWN}.safetensors", "a")
    with pytest.raises(SourceError, match="is not UTF-8 text"):
        require_names(["fine", ODD], "model")


def test_weights_may_lie_where_the_name_is_no_text(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own files have names that are; where they lead no file needs to say."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(job / "cache"))
    os.rename("a/model.safetensors", f"{ODD}/weights")
    Path("a/model.safetensors").symlink_to(job / ODD / "weights")
    assert merge_cli.merge("plain.yaml", "out", options=OPTIONS).report
    from merge_cli.checkpoint.fingerprint import model_fingerprint

    assert model_fingerprint(Path("a")) == model_fingerprint(Path("a"))


def test_what_is_text() -> None:
    require_arguments([1, None, "öut", Path("öut"), ["a", ("b",)], 0.5, True])
    with pytest.raises(UsageError, match="the argument"):
        require_arguments(["a", [Path(ODD)]])
    require_text("a\0b")  # no name of a file; whoever opens it says so
    assert shown("öut") == "öut"


def test_a_locale_without_utf8(job: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0",
                   "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    words = [sys.executable, "-m", "merge_cli", "run", "plain.yaml"]
    done = subprocess.run([*words, "öut"], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 2, done.stderr
    assert b"PYTHONUTF8=1" in done.stderr
    done = subprocess.run([*words, "out"], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [["plan", "../plain.yaml"], ["run", "{job}/plain.yaml", "{job}/out"], ["analyze", "a", "b"],
     ["evaluate", "{job}/a", "--data", "x"], ["init"], ["chat", "a"], ["demo"],
     ["push", "a", "b/c"], ["compare", "x"], ["convert", "a", "b"],
     ["extract-lora", "a", "b", "--base", "c"]],
)  # fmt: skip
def test_a_working_directory_that_is_gone(job: Path, command: list[str]) -> None:
    failed(_without_folder(job, command), 2, "the working directory is gone", "cd")


@pytest.mark.parametrize("command", [["methods"], ["schema"], ["--version"], ["run", "--help"]])
def test_what_reads_no_file_works_anywhere(job: Path, command: list[str]) -> None:
    assert _without_folder(job, command).returncode == 0


def _without_folder(job: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    gone = job / "gone"
    gone.mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    words = [word.format(job=job) for word in command]
    return subprocess.run(
        ["sh", "-c", script, gone, sys.executable, "-m", "merge_cli", *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
