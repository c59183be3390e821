"""A folder of statistics that were gathered before: `statistics: FOLDER` instead of data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import (
    CorruptFileError,
    MergeCliError,
    MismatchError,
    SourceError,
    UsageError,
)
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
    exchanged(folder)
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


def exchanged(folder: Path) -> None:
    """The files of two models, changed for one another."""
    (folder / "1.safetensors").rename(folder / "first")
    (folder / "2.safetensors").rename(folder / "1.safetensors")
    (folder / "first").rename(folder / "2.safetensors")


def test_a_merge_with_a_folder_is_resolved_with_its_digests(models: Path) -> None:
    """Also where the recipe, without `inputs`, tells of others."""
    folder = gathered(models, "fisher")
    merge_cli.merge(without_data(models, "fisher"), models / "out", options=CPU)
    resolved = models / "out" / "merge_recipe.yaml"
    make_plan(load_recipe(resolved))
    exchanged(folder)
    with pytest.raises(SourceError, match="are not the statistics that this recipe"):
        make_plan(load_recipe(resolved))
    document = yaml.safe_load(resolved.read_text())
    del document["inputs"]
    resolved.write_text(yaml.safe_dump(document))
    merge_cli.merge(resolved, models / "again", options=CPU)
    make_plan(load_recipe(models / "again" / "merge_recipe.yaml"))


@pytest.mark.parametrize("origin", [5, True, "text", {"a": 1}, [3, None]])
def test_whatever_metadata_say_of_the_origin(models: Path, origin: Any) -> None:
    gathered(models, "fisher")
    metadata = {"gathered_from": origin}
    plan = make_plan(load_recipe(without_data(models, "fisher", metadata=metadata)))
    assert [item["model"] for item in plan.recipe.metadata["gathered_from"]] == ["a", "b"]


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_other_tensors_are_refused(models: Path, method: str) -> None:
    """All would be plain means, under the name of another method."""
    gathered(models, method)
    write_models(models / "other", config("gpt2"))
    recipe = without_data(models, method, models=["other/a", "other/b"])
    with pytest.raises(MismatchError, match="are of no tensor that is merged|has statistics of"):
        make_plan(load_recipe(recipe))


def test_the_plan_says_how_many_tensors_are_means(models: Path) -> None:
    gathered(models, "regmean")
    plan = make_plan(load_recipe(without_data(models, "regmean")))
    assert "statistics of 2 models are read from kept, for 14 merged tensors; 6 have none" in (
        " ".join(plan.notes)
    )


def test_more_files_than_models_are_refused(models: Path) -> None:
    """Of three models one was taken out: which file is whose cannot be told."""
    folder = gathered(models, "fisher")
    shutil.copy(folder / "2.safetensors", folder / "3.safetensors")
    with pytest.raises(SourceError, match="the recipe has 2 models.*3.safetensors|3.safetensors"):
        make_plan(load_recipe(without_data(models, "fisher")))


def test_models_must_share_a_vocabulary(models: Path) -> None:
    """As with data: importances of rows are of the tokens that they stand for."""
    gathered(models, "fisher")
    union = without_data(models, "fisher", tokenizer_source="union")
    make_plan(load_recipe(union))  # nothing is moved
    path = models / "b" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="share no vocabulary"):
        make_plan(load_recipe(without_data(models, "fisher")))
    with pytest.raises(MergeCliError, match="share a vocabulary"):
        make_plan(load_recipe(without_data(models, "fisher", tokenizer_source="union")))


def test_a_folder_of_statistics_is_no_model(models: Path) -> None:
    folder = gathered(models, "fisher")
    recipe = models / "soup.yaml"
    recipe.write_text("merge_method: soup\nmodels: [a, b]\n")
    with pytest.raises(UsageError, match="is not a model"):
        merge_cli.merge(recipe, folder, options=replace(CPU, overwrite=True))
    assert len(list(folder.iterdir())) == 2
