"""A search that starts from the journal of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import UsageError
from merge_cli.evolve.plan import plan_search
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.evolve_tiny import OPTIONS, journal, run_search, write_family, write_search

START = {"start": "first.jsonl"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, and the journal of a short search."""
    folder = write_family(tmp_path_factory.mktemp("family"))
    found = run_search(write_search(folder, {"evaluations": 6}), folder / "early")
    (folder / "first.jsonl").write_bytes(found.folder.journal.read_bytes())
    return folder


@pytest.fixture
def folder(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    for path in family.iterdir():
        if path.name != "recipe.yaml":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def plan(folder: Path, changes: dict[str, Any], **keys: Any) -> Any:
    return plan_search(make_plan(load_recipe(write_search(folder, changes, **keys))), OPTIONS)


@pytest.mark.parametrize("optimizer", ["cma-es", "tpe"])
def test_the_best_of_the_journal_are_evaluated_first(folder: Path, optimizer: str) -> None:
    changes = {**START, "finalists": 3, "evaluations": 4, "optimizer": optimizer}
    changes["population"] = 4
    recipe = write_search(folder, changes, seed=4)
    found = run_search(recipe, folder / "warm")
    first = [line for line in journal(folder / "first.jsonl")[1:] if line["kind"] == "candidate"]
    lines = journal(found.folder.journal)[1:]
    again = {x["merge"]: x for x in lines if x["kind"] == "static" and "earlier" in x["merge"]}
    assert len(again) == 3
    for name, line in again.items():  # the same merge has the same scores
        number = int(name.rpartition(" ")[2]) - 1
        assert line["values"] == first[number]["values"]
    means = [sum(v["loss"][0] for v in x["values"].values()) for x in first]
    best = sorted(range(len(first)), key=means.__getitem__)[:3]
    assert {f"earlier candidate {i + 1}" for i in best} == set(again)
    search_scores = [entry["score"] for entry in found.record["static"]]
    assert found.record["history"][0]["best"] <= min(search_scores)
    resumed = run_search(recipe, folder / "warm")
    assert resumed.text == found.text


def test_a_wider_range_fits_and_a_narrower_one_is_refused(folder: Path) -> None:
    wider = plan(folder, {**START, "parameters": {"weight": {"min": 0, "max": 2.0}}})
    earlier = [merge for merge in wider.statics if "earlier" in merge.name]
    assert len(earlier) == 5
    with pytest.raises(UsageError, match="outside this search's range, 0 to 0.01"):
        plan(folder, {**START, "parameters": {"weight": {"min": 0, "max": 0.01}}})


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({"layer_groups": 2}, {}, "it has no 'weight of a, layer 0'"),
        ({"parameters": {"lambda": {"min": 0, "max": 1}}}, {}, "this search has no 'weight of a'"),
        ({}, {"objective": [{"task": "loss", "name": "mine", "data": "a.search.jsonl"}]},
         "it has no task 'mine'"),
        ({"start": "a.search.jsonl"}, {}, "has no candidate of a search"),
    ],
)  # fmt: skip
def test_another_search_is_refused_by_name(
    folder: Path, changes: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(folder, {**START, **changes}, **keys)


def test_another_journal_is_another_search(folder: Path) -> None:
    recipe = write_search(folder, {**START, "evaluations": 1, "finalists": 1})
    run_search(recipe, folder / "warm")
    content = (folder / "first.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "first.jsonl").unlink()
    lines = [line for line in content if b'"candidate"' not in line or b'"number":0' in line]
    (folder / "first.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UsageError, match="another"):
        run_search(recipe, folder / "warm")
