"""What a search is known by, and what it refuses because a score would be of another model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from merge_cli.errors import RecipeError, SourceError, UsageError
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.tasks.python import PythonTask
from merge_cli.evolve.journal import search_fingerprint
from merge_cli.evolve.optimizers import make_optimizer
from merge_cli.evolve.plan import plan_search
from merge_cli.evolve.space import Space
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.evolve_tiny import OPTIONS, run_search, write_family, write_search


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return write_family(tmp_path)


def digest(recipe: Path) -> str:
    return search_fingerprint(make_plan(load_recipe(recipe)), "cpu")


def test_the_key_is_the_same_in_every_process(folder: Path) -> None:
    """Sets of words have another order in each; a journal must be found again all the same."""
    recipe = write_search(folder, {"parameters": {"weight": {"min": 0, "max": 1, "tied": True}}})
    code = (
        "import sys\nfrom merge_cli.planning.planner import load_recipe, make_plan\n"
        "from merge_cli.evolve.journal import search_fingerprint\n"
        "print(search_fingerprint(make_plan(load_recipe(sys.argv[1])), 'cpu'))\n"
    )
    found = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code, str(recipe)],
            env=environment, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1


def test_another_tokenizer_is_another_search(folder: Path) -> None:
    recipe = write_search(folder)
    before = digest(recipe)
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    assert digest(recipe) != before
    assert digest(write_search(folder, models=("b", "a"))) != before


@pytest.mark.parametrize("seed", range(6))
def test_cma_es_searches_a_single_number(folder: Path, seed: int) -> None:
    recipe = load_recipe(
        write_search(folder, {"parameters": {"weight": {"min": 0, "max": 1, "tied": True}},
                              "population": 6, "sigma": 0.5, "restarts": 1})
    )  # fmt: skip
    space = Space(recipe, 2)
    assert len(space) == 1
    assert recipe.search is not None
    one = make_optimizer(recipe.search, space, seed, [0.5], 1)
    best = 1.0
    for _ in range(12):
        asked = one.ask()
        assert all(len(genome) == 1 and 0 <= genome[0] <= 1 for genome in asked)
        ranks = [abs(genome[0] - 0.8) for genome in asked]
        best = min(best, *ranks)
        one.tell(asked, ranks, [(rank,) for rank in ranks])
        if one.ended:
            break
    assert best < 0.05


def test_averages_that_would_be_other_models_are_refused(folder: Path) -> None:
    """Whose config, tokenizer or head an average has must not depend on who is in it."""
    recipe = write_search(folder, method="greedy_soup", splits=("search", "test"))
    text = recipe.read_text().replace("base_model: base\n", "")
    recipe.write_text(text)
    plan_search(make_plan(load_recipe(recipe)), OPTIONS)
    config = json.loads((folder / "b" / "config.json").read_text())
    (folder / "b" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(RecipeError, match="differ in config.json or tokenizer files"):
        plan_search(make_plan(load_recipe(recipe)), OPTIONS)
    recipe.write_text(f"{text}tokenizer_source: b\n")
    with pytest.raises(RecipeError, match="not every average contains that model"):
        load_recipe(recipe)


def test_a_start_of_other_models_is_refused(folder: Path) -> None:
    (folder / "start.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [a]\n"
    )
    with pytest.raises(UsageError, match="has other models than the search: not b"):
        run_search(write_search(folder, {"start": "start.yaml"}), folder / "out")


def test_a_python_task_that_cannot_be_imported_is_told(folder: Path) -> None:
    (folder / "mine.py").write_text("import nothing_of_that_name\n")
    task = PythonTask(name="mine", python="mine.py:score", folder=folder)
    live = LiveModel("m", None, None, "cpu", "float32", 8, 8)
    with pytest.raises(SourceError, match="cannot be imported: ModuleNotFoundError"):
        task.score(live, lambda done, total: None)
