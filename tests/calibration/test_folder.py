"""A folder of statistics that were gathered before: `statistics: FOLDER` instead of data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import CorruptFileError, MergeCliError, MismatchError, SourceError
from merge_cli.methods.registry import method_names
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.dam_tiny import config, write_models
from tests.support.statistics_tiny import CPU, cache, calibrated, merged, models, write_recipe

__all__ = ["cache", "models"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("cache"),
]
METHODS = ("regmean", "fisher")


def gathered(models: Path, method: str) -> Path:
    """What a recipe gathers, in a folder `kept`; the cache is gone."""
    folder = models / "kept"
    folder.mkdir(exist_ok=True)
    for number, file in enumerate(calibrated(write_recipe(models, method)).files, 1):
        shutil.copy(file.path, folder / f"{number}.safetensors")
    shutil.rmtree(models / "cache")
    return folder


def without_data(folder: Path, method: str, **keys: Any) -> Path:
    """A recipe whose statistics are given."""
    document = {"merge_method": method, "models": ["a", "b"], "statistics": "kept", **keys}
    path = folder / "kept.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def no_model_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_cli.calibration.run.load", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_with_a_folder_is_that_of_the_data(models: Path, method: str) -> None:
    expected = merged(write_recipe(models, method), models / "expected")
    gathered(models, method)
    for name in ("a", "b"):
        (models / f"{name}.jsonl").unlink()
    result = merge_cli.merge(without_data(models, method), models / "out", options=CPU)
    found = load_file(result.path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [one["examples"] for one in result.report["gathered"]["sources"]] == [5, 5]
    # Its own recipe leads to the folder, and runs again.
    resolved = yaml.safe_load((result.path / "merge_recipe.yaml").read_text())
    assert resolved["statistics"] == "../kept"
    assert "data" not in resolved["models"][0]
    merge_cli.merge(result.path / "merge_recipe.yaml", models / "again", options=CPU)
    again = (models / "again" / "model.safetensors").read_bytes()
    assert again == (result.path / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("no_model_is_run")
def test_a_plan_of_a_folder_reads_headers_alone(models: Path) -> None:
    (models / "kept").mkdir()
    with pytest.raises(CorruptFileError, match=r"missing.*1\.safetensors"):
        make_plan(load_recipe(without_data(models, "fisher")))


@pytest.mark.parametrize("method", METHODS)
def test_a_changed_byte_is_found_before_anything_is_written(models: Path, method: str) -> None:
    file = gathered(models, method) / "2.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"is not what was gathered.*2\.safetensors"):
        merge_cli.merge(without_data(models, method), models / "out", options=CPU)
    assert not (models / "out").exists()
    file.write_bytes(raw[:-3])
    with pytest.raises(MergeCliError, match=r"2\.safetensors"):
        make_plan(load_recipe(without_data(models, method)))


def test_statistics_of_another_kind_or_shape_are_refused(models: Path) -> None:
    gathered(models, "fisher")
    with pytest.raises(CorruptFileError, match="'fisher', and not 'gram'"):
        make_plan(load_recipe(without_data(models, "regmean")))
    wider = config("llama")
    wider.intermediate_size += 8
    for method in METHODS:
        gathered(models, method)
        write_models(models / "wider", wider)
        recipe = without_data(models, method, models=["wider/a", "wider/b"])
        with pytest.raises(MismatchError, match=r"1\.safetensors has statistics of"):
            make_plan(load_recipe(recipe))


def test_a_file_that_is_no_file_of_statistics_is_refused(models: Path) -> None:
    folder = gathered(models, "fisher")
    save_file({"a": torch.zeros(2)}, folder / "1.safetensors")
    with pytest.raises(CorruptFileError, match="is not a file of statistics"):
        make_plan(load_recipe(without_data(models, "fisher")))


def test_a_resolved_recipe_takes_no_other_statistics(models: Path) -> None:
    """The files of two models, changed for one another, fit in everything but their digests."""
    merged(write_recipe(models, "fisher"), models / "out")
    recipe = models / "out" / "merge_recipe.yaml"
    folder = gathered(models, "fisher")
    document = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**document, "statistics": "../kept"}))
    make_plan(load_recipe(recipe))
    (folder / "1.safetensors").rename(folder / "first")
    (folder / "2.safetensors").rename(folder / "1.safetensors")
    (folder / "first").rename(folder / "2.safetensors")
    with pytest.raises(SourceError, match="are not the statistics that this recipe"):
        make_plan(load_recipe(recipe))
    recipe.write_text(yaml.safe_dump({**document, "statistics": "../kept", "inputs": {}}))
    make_plan(load_recipe(recipe))


@pytest.mark.parametrize("method", sorted(set(method_names()) - set(METHODS)))
def test_other_methods_take_no_folder(models: Path, method: str) -> None:
    (models / "kept").mkdir()
    recipe = without_data(models, method)
    with pytest.raises(MergeCliError, match=f"{method} merges with no gathered statistics"):
        load_recipe(recipe)


def test_a_folder_that_is_not_there_and_data_without_effect(models: Path) -> None:
    with pytest.raises(MergeCliError, match="no such folder: kept"):
        load_recipe(without_data(models, "fisher"))
    (models / "kept").write_text("a file")
    with pytest.raises(MergeCliError, match="no such folder: kept"):
        load_recipe(without_data(models, "fisher"))
    (models / "kept").unlink()
    gathered(models, "fisher")
    sources = [{"model": "a", "data": "a.jsonl"}, {"model": "b"}]
    recipe = load_recipe(without_data(models, "fisher", models=sources))
    assert any("data: has no effect: the statistics are given" in w for w in recipe.warnings)


def test_a_stage_brings_its_statistics(models: Path) -> None:
    """Each document of a recipe with several leads to its own."""
    gathered(models, "fisher")
    first = {"name": "both", "merge_method": "fisher", "models": ["a", "b"], "statistics": "kept"}
    second = {"merge_method": "soup", "models": ["both", "base"]}
    recipe = models / "two.yaml"
    recipe.write_text(yaml.safe_dump_all([first, second]))
    result = merge_cli.merge(recipe, models / "out", options=CPU)
    resolved = result.path / "merge_recipe.yaml"
    documents = list(yaml.safe_load_all(resolved.read_text()))
    assert documents[0]["statistics"] == "../kept"
    merge_cli.merge(resolved, models / "again", options=CPU)
    again = (models / "again" / "model.safetensors").read_bytes()
    assert again == (result.path / "model.safetensors").read_bytes()
