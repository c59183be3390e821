"""`run --tune`: one number of a plain recipe, found on data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import merge_cli
from merge_cli.cli import app
from merge_cli.errors import RecipeError, UsageError
from merge_cli.evolve.tuning import tuned
from merge_cli.planning.planner import load_recipe
from tests.support.command import cli, failed
from tests.support.evolve_tiny import merge as merge_all
from tests.support.evolve_tiny import run_search, write_family

RECIPE = """merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b}
parameters: {lambda: 0.9, normalize: true}
dtype: bfloat16
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    write_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_one_number_is_found_and_the_rest_stays(folder: Path) -> None:
    recipe = tuned(load_recipe(folder / "recipe.yaml"), ["lambda=0:1.5"],
                   [folder / "a.search.jsonl"], 6)  # fmt: skip
    found = merge_cli.merge(recipe, folder / "out").path
    best = yaml.safe_load((found / "best_recipe.yaml").read_text())
    assert best["merge_method"] == "task_arithmetic"
    assert 0 <= best["parameters"]["lambda"] <= 1.5
    assert best["parameters"]["normalize"] is True
    assert best["models"][0]["parameters"]["weight"] == 0.5
    again = merge_all(found / "best_recipe.yaml", folder / "again").path
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (found / weights).read_bytes()


def test_a_parameter_of_models_is_one_number_for_all(folder: Path) -> None:
    recipe = tuned(load_recipe(folder / "recipe.yaml"), ["weight=0:1"],
                   [folder / "a.search.jsonl"], 2)  # fmt: skip
    assert recipe.search is not None
    assert recipe.search.parameters[0].tied == ("models", "layers", "filters")
    assert run_search is not None


@pytest.mark.parametrize(
    ("ranges", "message"),
    [(["lamda=0:1"], "has no parameter 'lamda'"), (["lambda=1"], "is not a range"),
     (["lambda=1:0"], "must be the larger"), ([], "--tune-on needs --tune")],
)  # fmt: skip
def test_mistakes_are_told(folder: Path, ranges: list[str], message: str) -> None:
    with pytest.raises((UsageError, RecipeError), match=message):
        tuned(load_recipe(folder / "recipe.yaml"), ranges, [folder / "a.search.jsonl"])


def test_a_parameter_has_one_range(folder: Path) -> None:
    recipe, data = load_recipe(folder / "recipe.yaml"), [folder / "a.search.jsonl"]
    with pytest.raises(UsageError, match="lambda has two ranges"):
        tuned(recipe, ["lambda=0:1", "weight=0:1", "lambda=0:2"], data)
    alone = cli("run", folder / "recipe.yaml", folder / "out", "--tune-evaluations", "5")
    failed(alone, 2, "--tune needs text")


def test_data_is_needed_and_the_method_must_be_plain(folder: Path) -> None:
    with pytest.raises(UsageError, match="needs text to judge by"):
        tuned(load_recipe(folder / "recipe.yaml"), ["lambda=0:1"], [])
    (folder / "soup.yaml").write_text(
        "merge_method: greedy_soup\nmodels: [{model: a}, {model: b}]\n"
        "objective: [{task: loss, data: a.search.jsonl}]\n"
    )
    with pytest.raises(UsageError, match="finds its parameters itself"):
        tuned(load_recipe(folder / "soup.yaml"), ["weight=0:1"], [folder / "a.search.jsonl"])
    (folder / "regmean.yaml").write_text(
        "merge_method: regmean\nmodels: [{model: a, data: a.search.jsonl}]\n"
    )
    with pytest.raises(UsageError, match="looks at examples first"):
        tuned(load_recipe(folder / "regmean.yaml"), ["alpha=0:1"], [folder / "a.search.jsonl"])


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(
        ["run", "-q", "--device", "cpu", "--threads", "1", str(folder / "recipe.yaml"),
         str(folder / "out"), "--tune", "lambda=0:1", "--tune-on", str(folder / "a.search.jsonl"),
         "--tune-evaluations", "3"],
        standalone_mode=False,
    )  # fmt: skip
    assert (folder / "out" / "best_recipe.yaml").is_file()
