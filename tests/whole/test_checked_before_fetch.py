"""Whatever is wrong with a recipe over models of the Hub is found before a weight is downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge_cli
from merge_cli.errors import (
    GateError,
    MergeCliError,
    MismatchError,
    RecipeError,
    SourceError,
    UsageError,
)
from merge_cli.options import MergeOptions, Progress
from tests.support.dam_tiny import config, write_data, write_models
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = MergeOptions(device="cpu", threads=1)
HEADER = 32_768  # bytes at the beginning of a shard that are read for its header
SOURCES: list[dict[str, Any]] = [{"model": "org/a"}, {"model": "org/b"}]
TAUGHT: list[dict[str, Any]] = [
    {"model": "org/a", "data": "a.jsonl"},
    {"model": "org/b", "data": "b.jsonl"},
]
SEARCH: dict[str, Any] = {
    "method": "ties",
    "parameters": {"density": {"min": 0.1, "max": 0.9}},
    "evaluations": 4,
}
LOSS: dict[str, Any] = {"task": "loss", "data": "a.jsonl"}
PLAIN: dict[str, Any] = {"merge_method": "soup", "models": SOURCES}
LEARNED: dict[str, Any] = {"merge_method": "dam", "base_model": "org/base", "models": TAUGHT}
CALIBRATED: dict[str, Any] = {"merge_method": "regmean", "models": TAUGHT}


def searched(search: Mapping[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe that searches, with changes to its section `search`."""
    return {
        "merge_method": "evolutionary",
        "base_model": "org/base",
        "models": SOURCES,
        "search": {**SEARCH, **(search or {})},
        "objective": [LOSS],
        **keys,
    }


def taught(**data: Any) -> list[dict[str, Any]]:
    """The models with their data, except for what is given."""
    return [{**spec, "data": data.get(spec["model"][-1], spec["data"])} for spec in TAUGHT]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b, `other` with another tokenizer, `mute` with none; data of a and b."""
    folder = tmp_path_factory.mktemp("models")
    of = config(hidden_size=64, intermediate_size=128)
    write_models(folder, of, names=("base", "a", "b", "other"))
    path = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(tokenizer))
    write_models(folder, of, names=("mute",))
    for file in (folder / "mute").glob("*token*"):
        file.unlink()
    write_data(folder, names=("a", "b"))
    (folder / "rows.jsonl").write_text('{"txt": "no text"}\n')
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert (folder / "a" / "model.safetensors").stat().st_size > 4 * HEADER
    return folder


@pytest.fixture
def folder(models: Path, hub: HubServer, tmp_path: Path) -> Path:
    """A folder for a recipe, with the data; the models are on the Hub."""
    for name in ("base", "a", "b", "other", "mute"):
        hub.add(f"org/{name}", models / name)
    for path in models.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    return tmp_path


def weights_requested(hub: HubServer) -> list[str]:
    """Requests for more of a shard than its header."""
    result = []
    for request in hub.requests:
        if not request.path.endswith(".safetensors") or request.method == "HEAD":
            continue
        first, _, last = request.range.removeprefix("bytes=").partition("-")
        if not request.range or not last or int(first) > HEADER or int(last) >= HEADER:
            result.append(f"{request.method} {request.path} {request.range}")
    return result


def write(folder: Path, *documents: Mapping[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return path


CASES: dict[str, tuple[dict[str, Any], type[MergeCliError], str]] = {
    "an objective's task": (
        searched(objective=[{**LOSS, "task": "los"}]), RecipeError, "unknown task 'los'",
    ),
    "an objective's key": (searched(objective=[{**LOSS, "wieght": 2}]), RecipeError, "wieght"),
    "an objective's file": (
        searched(objective=[{**LOSS, "data": "nowhere.jsonl"}]), RecipeError, "no such file",
    ),
    "an objective's row": (
        searched(objective=[{**LOSS, "data": "rows.jsonl"}]), SourceError, "line 1: has neither",
    ),
    "an objective's function": (
        searched(objective=[{"python": "nowhere.py:score"}]), SourceError, "no such file",
    ),
    "an objective's splits": (
        searched(objective=[LOSS, {**LOSS, "split": "test", "name": "again"}]),
        MismatchError, "share 24 rows",
    ),
    "a search's range": (
        searched({"parameters": {"density": {"min": -1, "max": 0.9}}}), RecipeError, "density",
    ),
    "a search's parameter": (
        searched({"parameters": {"dense": {"min": 0.1, "max": 0.9}}}), RecipeError, "density",
    ),
    "a search's start": (searched({"start": "start.yaml"}), UsageError, "other models"),
    "a training's option": (
        {**LEARNED, "training": {"learning_rat": 1}}, RecipeError, "learning_rate",
    ),
    "a training's tensors": (
        {**LEARNED, "training": {"train": ["nothing"]}}, MismatchError, "chooses no tensor",
    ),
    "a teacher's file": (
        {**LEARNED, "models": taught(a="nowhere.jsonl")}, RecipeError, "no such file",
    ),
    "a teacher's row": (
        {**LEARNED, "models": taught(b="rows.jsonl")}, SourceError, "line 1: has neither",
    ),
    "a teacher's line": ({**LEARNED, "models": taught(b="torn.jsonl")}, SourceError, "line 2"),
    "a teacher's held-out rows": (
        {**LEARNED, "models": taught(a={"files": "a.jsonl", "held_out": "nowhere.jsonl"})},
        RecipeError, "no such file",
    ),
    "a teacher's tokenizer": (
        {**LEARNED, "models": [TAUGHT[0], {"model": "org/other", "data": "b.jsonl"}]},
        MismatchError, "tokenizers differ",
    ),
    "an example's file": (
        {**CALIBRATED, "models": taught(a="nowhere.jsonl")}, RecipeError, "no such file",
    ),
    "an example's row": (
        {**CALIBRATED, "models": taught(b="rows.jsonl")}, SourceError, "line 1: has neither",
    ),
    "an evaluation's task": (
        {**PLAIN, "eval": [{**LOSS, "task": "los"}]}, RecipeError, "unknown task 'los'",
    ),
    "an evaluation's file": (
        {**PLAIN, "eval": [{**LOSS, "data": "nowhere.jsonl"}]}, RecipeError, "no such file",
    ),
    "a search's tokenizer": (
        searched(base_model="org/mute"), SourceError, "tokenizer cannot be loaded",
    ),
    "an evaluation's tokenizer": (
        {**PLAIN, "models": [{"model": "org/mute"}], "eval": [LOSS]},
        SourceError, "tokenizer cannot be loaded",
    ),
    "an evaluation's row": (
        {**PLAIN, "eval": [{"task": "exact_match", "data": "a.jsonl"}]},
        SourceError, "needs 'prompt'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_recipe_and_data(case: str, folder: Path, hub: HubServer) -> None:
    document, error, message = CASES[case]
    write(folder, {"merge_method": "soup", "models": [{"model": "org/a"}]}).rename(
        folder / "start.yaml"
    )
    path, out = write(folder, document), folder / "out"
    with pytest.raises(error, match=message):
        merge_cli.merge(path, out, options=OPTIONS)
    assert weights_requested(hub) == []
    assert not out.exists()


@pytest.mark.parametrize(
    ("gates", "no_worse", "message"),
    [
        (["loss"], [], "is not a gate"),
        (["b.loss<=2"], [], "no task 'b' is evaluated"),
        (["a.los<=2"], [], "a has no metric 'los'"),
        ([], ["org/c:a.loss"], "none of the models of this recipe"),
        ([], ["org/a:a.los"], "a has no metric 'los'"),
    ],
)
def test_gates(
    gates: list[str], no_worse: list[str], message: str, folder: Path, hub: HubServer
) -> None:
    path = write(folder, {**PLAIN, "eval": [LOSS]})
    with pytest.raises(UsageError, match=message):
        merge_cli.merge(path, folder / "out", options=OPTIONS, gates=gates, no_worse=no_worse)
    assert weights_requested(hub) == []


def test_gates_without_tasks(folder: Path, hub: HubServer) -> None:
    with pytest.raises(UsageError, match="needs data to evaluate on"):
        merge_cli.merge(write(folder, PLAIN), folder / "out", gates=["a.loss<=2"])
    assert hub.requests == []


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        (searched(objective=[{**LOSS, "task": "los"}]), RecipeError, "unknown task 'los'"),
        ({**LEARNED, "models": taught(b="torn.jsonl")}, SourceError, "line 2"),
        ({**CALIBRATED, "models": taught(b="torn.jsonl")}, SourceError, "line 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_any_document_before_the_first_is_made(
    document: dict[str, Any], error: type[MergeCliError], message: str, last: bool,
    folder: Path, hub: HubServer,
) -> None:  # fmt: skip
    """Also one that merges what is still to be made."""
    first = {"name": "first", **PLAIN}
    second = {**document, "models": [{**document["models"][0], "model": "first"},
                                     document["models"][1]]}  # fmt: skip
    documents = [first, second if last else {**second, "name": "second"}]
    if not last:
        documents.append({"merge_method": "soup", "models": [{"model": "second"}]})
    with pytest.raises(error, match=message):
        merge_cli.merge(write(folder, *documents), folder / "out", options=OPTIONS)
    assert weights_requested(hub) == []


def test_a_task_of_the_harness(folder: Path, hub: HubServer) -> None:
    """Whether the harness is installed or not: in the second case that is what is said."""
    path = write(folder, {**PLAIN, "eval": [{"lm_eval": "no_such_task"}]})
    with pytest.raises(UsageError, match="lm-eval|lm_eval"):
        merge_cli.merge(path, folder / "out", options=OPTIONS)
    assert weights_requested(hub) == []


def test_weights_are_fetched_once_all_is_right(folder: Path, hub: HubServer) -> None:
    """The other side of the tests above: what they count is there to be counted."""
    path = write(folder, {**PLAIN, "eval": [{**LOSS, "limit": 2}]})
    result = merge_cli.merge(path, folder / "out", options=OPTIONS)
    assert weights_requested(hub)
    assert result.evaluation is not None
    assert result.evaluation[0]["model"] == "out"  # no path of this machine
    assert json.loads((folder / "out" / "merge_evaluation.json").read_text())["unmet"] == []


def test_eval_and_gates_of_the_library(models: Path, tmp_path: Path) -> None:
    """As `merge-cli run` does it: published, evaluated, and then the gates decide."""
    sources = [{"model": str(models / name)} for name in ("a", "b")]
    tasks = [{"task": "loss", "data": str(models / "a.jsonl"), "limit": 2}]
    path = write(tmp_path, {"merge_method": "soup", "models": sources, "eval": tasks})
    out, seen = tmp_path / "out", []

    def note(progress: Progress) -> None:
        seen.append(progress)

    with pytest.raises(GateError, match=r"a\.loss<=0"):
        merge_cli.merge(path, out, options=OPTIONS, gates=["a.loss<=0"], on_progress=note)
    assert (out / "model.safetensors").exists()
    assert seen
    made = (out / "merge_report.json").read_bytes()
    again = merge_cli.merge(path, out, options=OPTIONS, gates=["a.loss<=100"], no_worse=["a:a+100"])
    assert (out / "merge_report.json").read_bytes() == made  # not merged again
    assert again.evaluation is not None
    assert [item["model"] for item in again.evaluation] == ["out", str(models / "a")]
    other = merge_cli.merge(
        path, tmp_path / "other", options=OPTIONS, evaluation=[models / "b.jsonl"]
    )
    assert other.evaluation is not None
    assert list(other.evaluation[0]["tasks"]) == ["b"]
