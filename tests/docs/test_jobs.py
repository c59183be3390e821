"""Every recipe in docs/jobs.md is read by merge-cli, and by its schema for editors."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

import merge_cli
from merge_cli.json_schema import recipe_schema
from tests.support.documents import blocks
from tests.support.paths import ROOT

RECIPES = blocks("yaml", (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_it_is_read(text: str, tmp_path: Path) -> None:
    for step in range(41_000, 51_000, 1_000):  # a run on disk: its checkpoints are found by name
        (tmp_path / "runs" / "pretrain" / f"step_{step}").mkdir(parents=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = merge_cli.load_recipe(path)
    assert recipe.warnings == ()
    jsonschema.validate(yaml.safe_load(text), recipe_schema())
