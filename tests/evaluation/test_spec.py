"""What is to be evaluated: names of tasks, and numbers that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import merge_cli
from merge_cli.errors import UsageError
from merge_cli.evaluation.run import as_spec, spec_of
from merge_cli.options import MergeOptions


def test_files_of_one_name_go_by_their_paths_and_others_do_not() -> None:
    spec = as_spec(["a/x.jsonl", "b/x.jsonl", "b/y.jsonl"])
    assert [task.name for task in spec.tasks] == ["a/x.jsonl", "b/x.jsonl", "y"]


def test_a_file_beside_a_task_of_its_name(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("tasks:\n  - {task: loss, name: x, data: other.jsonl}\n")
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    spec = spec_of(file, [Path("a/x.jsonl"), Path("a/y.jsonl")])
    assert [task.name for task in spec.tasks] == ["x", "a/x.jsonl", "y"]


def test_a_name_that_is_another_files_path_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(
        "tasks:\n  - {task: loss, name: x, data: o.jsonl}\n"
        "  - {task: loss, name: a/x.jsonl, data: o.jsonl}\n"
    )
    (tmp_path / "o.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match=r"a/x.jsonl is to be evaluated twice"):
        spec_of(file, [Path("a/x.jsonl")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_spec(["a/x.jsonl", "a/x.jsonl"]), "a/x.jsonl is to be evaluated twice"),
        (lambda: as_spec([]), "no task"),
        (lambda: as_spec("a.jsonl").limited(0), "limit must be at least 1"),
        (lambda: as_spec("a.jsonl").limited(-3), "limit must be at least 1"),
        (lambda: as_spec("a.jsonl").changed(threads=-1), "threads must be at least 1"),
        (lambda: as_spec("a.jsonl").changed(max_length=0), "max_length must be at least 1"),
        (lambda: as_spec("a.jsonl").changed(batch_tokens=0), "batch_tokens must be at least 1"),
        (lambda: as_spec("a.jsonl").changed(dtype="floot32"), "Did you mean 'float32'"),
        (
            lambda: as_spec("a.jsonl").changed(dtype="int8"),
            "Known: auto, bfloat16, float16, float32",
        ),
        (lambda: MergeOptions(threads=-2), "threads must be at least 1"),
        (lambda: MergeOptions(threads=0), "threads must be at least 1"),
        (lambda: merge_cli.compare([], ["a.jsonl"], "out"), "no recipe"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
