"""Fisher merging is one of the merges that a search must beat, where all models have data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge_cli
from merge_cli.errors import MergeCliError, MismatchError, RecipeError
from merge_cli.evolve.plan import plan_search
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.evolve_tiny import (
    OPTIONS,
    journal,
    merge,
    run_search,
    write_family,
    write_search,
)

DISTANCE = """
from pathlib import Path
from safetensors.torch import load_file

def distance(net, tokenizer):
    wanted = load_file(Path(__file__).parent / "fisher" / "model.safetensors")
    parts = dict(net.named_parameters())
    return float(sum((parts[n].float() - w.float()).abs().sum() for n, w in wanted.items()))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("a", "b"):
        rows = [{"text": f"{name} to learn from {i} " + "uvw"[i % 3] * 5} for i in range(6)]
        (tmp_path / f"{name}.data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def with_data(**more: Any) -> list[dict[str, Any]]:
    return [{"model": name, "data": f"{name}.data.jsonl", **more} for name in ("a", "b")]


@pytest.mark.parametrize("method", ["evolutionary", "greedy_soup"])
def test_fisher_is_evaluated_and_in_the_verdict(folder: Path, method: str) -> None:
    changes = {"evaluations": 2, "population": 2} if method == "evolutionary" else None
    recipe = write_search(folder, changes, method=method, models=with_data(), splits=(
        "search", "test"), statistics={"examples": 4})  # fmt: skip
    found = run_search(recipe, folder / "out")
    lines = journal(found.folder.journal)
    (line,) = (x for x in lines[1:] if x["kind"] == "static" and x["merge"] == "fisher")
    assert not line["error"]
    assert line["genome"] == []
    assert "fisher" in found.record["scores"]
    assert found.record["verdict"]["best_static_score"] <= found.record["scores"]["fisher"]["score"]


def test_a_search_that_fisher_wins_publishes_fisher(folder: Path) -> None:
    """Candidates are judged by their distance from the Fisher merge on disk."""
    plain = {"merge_method": "fisher", "base_model": "base", "models": with_data(), "seed": 3,
             "dtype": "bfloat16"}  # fmt: skip
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    merge_cli.merge(folder / "plain.yaml", folder / "fisher", options=OPTIONS)
    (folder / "own.py").write_text(DISTANCE)
    recipe = write_search(folder, {"evaluations": 2, "population": 2}, models=with_data(),
                          objective=[{"python": "own.py:distance", "goal": "min"}])  # fmt: skip
    result = merge(recipe, folder / "out")
    search = result.report["search"]
    assert search["best"]["static"] == "fisher"
    assert search["best"]["score"] == 0
    assert not search["verdict"]["better"]
    weights = (folder / "fisher" / "model.safetensors").read_bytes()
    assert (folder / "out" / "model.safetensors").read_bytes() == weights
    again = merge(folder / "out" / "best_recipe.yaml", folder / "again")
    assert "search" not in again.report
    assert (folder / "again" / "model.safetensors").read_bytes() == weights


def test_other_data_are_another_search(folder: Path) -> None:
    recipe = write_search(folder, {"evaluations": 1}, models=with_data())
    run_search(recipe, folder / "out")
    with (folder / "a.data.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more row"}) + "\n")
    with pytest.raises(MergeCliError, match="another"):
        run_search(recipe, folder / "out")


def test_rows_that_choose_or_report_are_not_looked_at(folder: Path) -> None:
    models = [{"model": n, "data": [f"{n}.data.jsonl", f"{n}.search.jsonl"]} for n in ("a", "b")]
    recipe = write_search(folder, models=models)
    plan_search(make_plan(load_recipe(recipe)), OPTIONS)  # another split chooses
    recipe = write_search(folder, models=models, splits=("search", "test"))
    with pytest.raises(MismatchError, match=r"in the `data:` of a model, too: .*a.search.jsonl:1"):
        plan_search(make_plan(load_recipe(recipe)), OPTIONS)
    models = [{"model": n, "data": f"{n}.test.jsonl"} for n in ("a", "b")]
    recipe = write_search(folder, models=models)
    with pytest.raises(MismatchError, match="the split test has this row"):
        plan_search(make_plan(load_recipe(recipe)), OPTIONS)


@pytest.mark.parametrize(
    ("specs", "statistics", "message"),
    [
        ([*with_data()[:1], {"model": "b"}], {}, r"models\[1\].*Fisher merging needs that of all"),
        (with_data(), {"rounds": 2}, "has no effect in Fisher merging"),
        ([{"model": "a"}, {"model": "b"}], {"examples": 4}, "no model has `data:`"),
        (
            [{"model": n, "data": {"files": f"{n}.data.jsonl", "held_out": f"{n}.test.jsonl"}}
             for n in ("a", "b")], {}, "held_out",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    folder: Path, specs: Any, statistics: dict[str, Any], message: str
) -> None:
    more: dict[str, Any] = {"statistics": statistics} if statistics else {}
    with pytest.raises(RecipeError, match=message):
        make_plan(load_recipe(write_search(folder, models=specs, **more)))
