"""A search over what other documents of the recipe make: no file names their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import merge_cli
from tests.support.evolve_tiny import OPTIONS, write_family, write_search

STAGE = (
    "name: {}\nmerge_method: linear\nmodels: [{{model: a}}, {{model: {}}}]\ndtype: bfloat16\n---\n"
)


def test_no_file_of_the_result_names_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    folder = write_family(tmp_path)
    recipe = write_search(folder, {"evaluations": 4, "population": 2}, models=("first", "first-b"))
    recipe.write_text(
        STAGE.format("first", "b") + STAGE.format("first-b", "c") + recipe.read_text()
    )
    out = folder / "out"
    merge_cli.merge(recipe, out, options=OPTIONS)
    assert not (folder / "out.stages").exists()
    texts = [path for path in out.iterdir() if path.suffix != ".safetensors"]
    assert not [path.name for path in texts if "out.stages" in path.read_text()]
    report = json.loads((out / "merge_report.json").read_text())
    assert [item["model"] for item in report["inputs"]] == ["base", "first", "first-b"]
    best = list(yaml.safe_load_all((out / "best_recipe.yaml").read_text()))
    assert [document.get("name") for document in best] == ["first", "first-b", None]
    merge_cli.merge(out / "best_recipe.yaml", folder / "again", options=OPTIONS)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
