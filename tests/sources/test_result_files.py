"""No command writes a result over what it reads, whatever the option and however it is reached."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from merge_cli.cli import app
from merge_cli.errors import UsageError
from merge_cli.sources.result_files import check_writable, refuse_replacing
from tests.support.command import cli, failed
from tests.support.tiny import Family

GROUP: Any = typer.main.get_command(app)
READ = {"prompts", "data", "eval_file", "tune_on"}  # options that name files to read
WRITTEN = {("evaluate", "examples"), ("analyze", "html"), ("analyze", "write_recipe"),
           ("init", "output")}  # fmt: skip

# What is written, and a file of `job` that the command reads or that lies in a model's folder.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "--examples": (
        ["evaluate", "a", "--eval", "eval.yaml", "--against", "b+adapter", "--examples"],
        ["eval.yaml", "rows.jsonl", "shots.jsonl", "task.py", "a/config.json", "a/notes.txt",
         "b/model.safetensors", "adapter/adapter_model.safetensors", "teacher/config.json"],
    ),
    "--html": (
        ["analyze", "recipe.yaml", "--html"],
        ["recipe.yaml", "rows.jsonl", "base/model.safetensors", "a/notes.txt", "a/README.md"],
    ),
    "--write-recipe": (
        ["analyze", "--base", "base", "a", "b", "--write-recipe"],
        ["base/config.json", "a/model.safetensors", "b/notes.txt"],
    ),
    "--output": (
        ["init", "--base", "base", "--model", "a", "--data", "rows.jsonl", "--overwrite", "--yes",
         "--output"],
        ["rows.jsonl", "base/config.json", "a/model.safetensors"],
    ),
}  # fmt: skip
CASES = [(option, file) for option, (_, files) in COMMANDS.items() for file in files]


@pytest.fixture
def job(family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models, a recipe, data and tasks, in the working directory."""
    folder = family.folder
    monkeypatch.chdir(folder)
    for name in ("base", "a", "b", "teacher"):
        if name == "teacher":
            os.rename("c", name)
        Path(name, "notes.txt").write_text("mine")
        Path(name, "README.md").write_text("---\nlicense: mit\n---\n")
    assert cli("extract-lora", "b", "adapter", "--base", "base", "--rank", "2").returncode == 0
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("shots.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    Path("task.py").write_text("def score(net, tokenizer):\n    return 1.0\n")
    Path("eval.yaml").write_text(
        "tasks:\n"
        "  - {task: loss, data: rows.jsonl, name: loss}\n"
        "  - {task: exact_match, data: shots.jsonl, fewshot: shots.jsonl, name: exact}\n"
        "  - {task: kl, data: rows.jsonl, teacher: teacher, name: kl}\n"
        "  - {task: python, python: 'task.py:score', name: own}\n"
    )
    Path("recipe.yaml").write_text(
        "merge_method: fisher\nbase_model: base\n"
        "models: [{model: a, data: rows.jsonl}, {model: b, data: rows.jsonl}]\n"
    )
    return folder


def spellings(file: Path, folder: Path) -> dict[str, Path]:
    """A file by its name, by links to it, by another name of it, and by a link to its folder."""
    (folder / "symbolic").symlink_to(file)
    (folder / "hard").hardlink_to(file)
    (folder / "elsewhere").symlink_to(file.parent)
    return {"name": file, "link": folder / "symbolic", "hard link": folder / "hard",
            "folder": folder / "elsewhere" / file.name}  # fmt: skip


@pytest.mark.parametrize(("option", "file"), CASES)
def test_what_is_read_stays(job: Path, option: str, file: str) -> None:
    before = (job / file).read_bytes()
    failed(cli(*COMMANDS[option][0], file), 2, option, file, "Name another file")
    assert (job / file).read_bytes() == before


@pytest.mark.parametrize("way", ["name", "link", "hard link", "folder"])
@pytest.mark.parametrize("file", ["rows.jsonl", "base/model.safetensors"])
def test_links_lead_to_it(job: Path, file: str, way: str) -> None:
    named = spellings(job / file, job)[way]
    failed(cli("analyze", "recipe.yaml", "--html", named), 2, "--html", "would replace a file")


def test_every_option_that_names_a_file_is_known() -> None:
    """A new one belongs to the files that are read, or is tested above."""
    named = {
        (name, option.name)
        for name in GROUP.commands
        for option in GROUP.commands[name].params
        if option.metavar == "FILE" and option.name not in READ
    }
    assert named == WRITTEN
    assert len(COMMANDS) == len(WRITTEN)


@pytest.mark.parametrize("option", COMMANDS)
def test_it_is_told_before_any_work(job: Path, option: str) -> None:
    for name in ("no/file", "a"):
        failed(cli(*COMMANDS[option][0], name), 2)


def test_two_results_in_one_file(job: Path) -> None:
    Path("page").symlink_to("result")
    done = cli("analyze", "a", "b", "--html", "page", "--write-recipe", "result")
    failed(done, 2, "--html and --write-recipe name one file")


def test_new_files_beside_a_model(job: Path) -> None:
    """Only under names that no model has."""
    words = ["analyze", "a", "b", "--quiet", "--html"]
    assert cli(*words, "a/page.html").returncode == 0
    failed(cli(*words, "a/page.html"), 2, "in the folder of a model")
    failed(cli(*words, "a/tokenizer.json"), 2, "belongs to a model")


def test_pipes_and_devices_are_no_files() -> None:
    results: dict[str, Path | None] = {
        "--a": Path(os.devnull),
        "--b": Path(os.devnull),
        "--c": None,
    }
    check_writable(results)
    refuse_replacing(results, files=[Path(os.devnull)])


def test_a_file_that_does_not_exist_is_no_input(tmp_path: Path) -> None:
    refuse_replacing({"--a": tmp_path / "new"}, files=[tmp_path / "other"])
    with pytest.raises(UsageError, match="would replace"):
        refuse_replacing({"--a": tmp_path / "x" / ".." / "new"}, files=[tmp_path / "new"])


@pytest.mark.parametrize("file", ["comparison.csv", "examples.jsonl", "recipes/uniform-soup.yaml"])
def test_a_comparison_keeps_what_it_reads(job: Path, file: str) -> None:
    path = job / "out" / file
    path.parent.mkdir(parents=True)
    soup = f"merge_method: soup\nmodels: [{{model: {job}/a}}, {{model: {job}/b}}]\n"
    path.write_text(soup if file.endswith(".yaml") else '{"text": "a"}\n')
    recipe = path if file.endswith(".yaml") else job / "recipe.yaml"
    data = "rows.jsonl" if file.endswith(".yaml") else path
    before = path.read_bytes()
    failed(cli("compare", recipe, "--data", data, "--out", "out"), 2, f"--out ({file})")
    assert path.read_bytes() == before


def _flags(job: Path) -> list[str]:
    return ["--data", "out/rows.json"]


def _eval_file(job: Path) -> list[str]:
    (job / "eval.yaml").write_text("tasks: [{task: loss, data: out/rows.json, name: x}]\n")
    return ["--eval", "eval.yaml"]


def _own_task(job: Path) -> list[str]:
    (job / "out" / "task.py").write_text((job / "task.py").read_text())
    (job / "eval.yaml").write_text("tasks: [{task: python, python: 'out/task.py:score'}]\n")
    return ["--eval", "eval.yaml"]


def _teacher(job: Path) -> list[str]:
    (job / "eval.yaml").write_text("tasks: [{task: kl, data: rows.jsonl, teacher: out}]\n")
    return ["--eval", "eval.yaml"]


def _section(job: Path) -> list[str]:
    with (job / "soup.yaml").open("a") as file:
        file.write("eval: [{task: loss, data: out/rows.json, name: x}]\n")
    return []


def _examples(job: Path) -> list[str]:
    text = (job / "recipe.yaml").read_text().replace("rows.jsonl", "out/rows.json")
    (job / "soup.yaml").write_text(text)
    return []


def _tuning(job: Path) -> list[str]:
    return ["--tune", "weight=0:1", "--tune-on", "out/rows.json"]


@pytest.mark.parametrize(
    "reads", [_flags, _eval_file, _own_task, _teacher, _section, _examples, _tuning]
)
def test_out_holds_nothing_that_is_read(job: Path, reads: Callable[[Path], list[str]]) -> None:
    (job / "soup.yaml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    assert cli("run", "soup.yaml", "out", "--quiet").returncode == 0
    (job / "out" / "rows.json").write_text('{"text": "a"}\n')
    words = reads(job)
    done = cli("run", "soup.yaml", "out", "--overwrite", "--dry-run", *words)
    failed(done, 2, "the output would replace")
