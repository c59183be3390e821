"""The engine with a file of coefficients: naive float64 formula, the same bytes however it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.checkpoint.coefficients import FORMAT
from merge_cli.dam.coefficients import Coefficients, layout_of
from merge_cli.errors import CorruptFileError, MismatchError, RecipeError
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.recipe.training import Training
from tests.support.tiny import Family, llama_family, merge, read_model

GRANULARITIES = ("tensor", "column", "row", "element", "low_rank")


def write_coefficients(
    family: Family, granularity: str, form: str = "soup", *, sources: int = 3
) -> dict[str, torch.Tensor]:
    """Random coefficients for every tensor of the family, as training would leave them."""
    generator = torch.Generator().manual_seed(11)
    entries: dict[str, torch.Tensor] = {}
    for name, tensor in family.base.items():
        layout = layout_of(tensor.shape, granularity, 2)
        own = Coefficients(name, layout, sources, Training(granularity=granularity), 0)  # type: ignore[arg-type]
        for parameter in own.parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
        own.moved()
        entries |= own.entries()
    save_file(entries, family.folder / "c.safetensors", metadata={"format": FORMAT, "form": form})
    return entries


def recipe_of(family: Family, form: str = "soup", **keys: Any) -> Path:
    return family.recipe("dam", base=form == "task_vector", coefficients="c.safetensors", **keys)


def expected(
    family: Family, entries: dict[str, torch.Tensor], name: str, form: str
) -> np.ndarray[Any, Any]:
    base, sources = family.arrays(name)
    total = base.copy() if form == "task_vector" else np.zeros_like(base)
    for i, source in enumerate(sources):
        c = np.broadcast_to(entries[name][i].double().numpy(), base.shape)
        if name + ":rows" in entries:
            rows, columns = (
                entries[name + end][i].double().numpy() for end in (":rows", ":columns")
            )
            c = c + (rows @ columns.T).reshape(base.shape)
        total += c * (source - base if form == "task_vector" else source)
    return total


@pytest.mark.parametrize("form", ["soup", "task_vector"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_result_is_the_naive_formula(family: Family, granularity: str, form: str) -> None:
    entries = write_coefficients(family, granularity, form)
    merged = merge(recipe_of(family, form, dtype="float32"), family.folder / "out")
    for name, tensor in merged.items():
        wanted = expected(family, entries, name, form)
        np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_same_bytes_however_it_runs(tmp_path: Path, granularity: str) -> None:
    """One thread or several, numpy or torch, one shard or many, small blocks, and again."""
    family = llama_family(tmp_path, layers=2)
    write_coefficients(family, granularity)
    recipe = recipe_of(family)
    first = merge(recipe, tmp_path / "first", threads=1)
    several = merge(recipe, tmp_path / "several", threads=3, shard_size=4000)
    for name, tensor in first.items():
        assert torch.equal(tensor, several[name])
    again = merge(tmp_path / "first" / "merge_recipe.yaml", tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merge_cli.engine.pool.choose_arithmetic", lambda plan: ("torch", "a test"))
        patch.setattr("merge_cli.engine.memory.choose_arithmetic", lambda plan: ("torch", "a test"))
        torches = merge(recipe, tmp_path / "torch")
    assert all(torch.equal(tensor, torches[name]) for name, tensor in first.items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_spans_do_not_depend_on_cuts(granularity: str) -> None:
    """The coefficient of an element is the same in whatever span it is asked for."""
    from merge_cli.checkpoint.coefficients import TensorCoefficients

    generator = torch.Generator().manual_seed(1)
    for shape in ((7, 11), (13,), (3, 5, 4), (1, 9), (2, 1, 3)):
        layout = layout_of(shape, granularity, 2)
        own = Coefficients("w", layout, 2, Training(), 3)
        for parameter in own.parameters:
            parameter += torch.randn(parameter.shape, generator=generator)
        own.moved()
        entries = {name: value.numpy() for name, value in own.entries().items()}
        found = TensorCoefficients(shape, entries["w"], entries.get("w:rows"),
                                   entries.get("w:columns"))  # fmt: skip
        size = int(np.prod(shape))
        like = np.zeros(0, np.float32)
        whole = np.broadcast_to(np.asarray(found.span(1, 0, size, like), np.float32), (size,))
        block = own.block(0, layout.rows)[1].expand(layout.rows, layout.columns).reshape(-1)
        np.testing.assert_array_equal(whole, block.numpy())
        for start, stop in ((0, 1), (1, size), (size // 3, size // 2 + 1), (size - 1, size)):
            part = np.asarray(found.span(1, start, stop - start, like), np.float32)
            np.testing.assert_array_equal(np.broadcast_to(part, (stop - start,)), whole[start:stop])
        assert found.mean(1) == pytest.approx(float(whole.astype(np.float64).mean()), rel=1e-5)


def test_an_interrupted_merge_resumes_to_the_same_bytes(family: Family, tmp_path: Path) -> None:
    write_coefficients(family, "column")
    recipe = recipe_of(family)
    whole = merge(recipe, tmp_path / "whole", threads=1)
    from merge_cli.engine.journal import Journal

    record, count = Journal.record, 0

    def stop(self: Journal, *arguments: Any) -> None:
        nonlocal count
        record(self, *arguments)
        count += 1
        if count == 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        with pytest.raises(merge_cli.MergeCliError, match="stopped"):
            merge(recipe, tmp_path / "out", threads=1)
    resumed = merge(recipe, tmp_path / "out", threads=1)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_other_coefficients_are_other_work(family: Family, tmp_path: Path) -> None:
    from merge_cli.engine.journal import work_key

    write_coefficients(family, "column")
    plan = make_plan(load_recipe(recipe_of(family)))
    before = work_key(plan)
    entries = load_file(family.folder / "c.safetensors")
    entries["model.norm.weight"] += 1e-6
    save_file(entries, family.folder / "c.safetensors", metadata={"format": FORMAT, "form": "soup"})
    assert work_key(make_plan(load_recipe(recipe_of(family)))) != before


def test_the_folder_is_complete(family: Family, tmp_path: Path) -> None:
    write_coefficients(family, "column")
    merge(recipe_of(family), tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out" / "merge_recipe.yaml").read_text())
    assert written["coefficients"] == "./coefficients.safetensors"
    assert (tmp_path / "out" / "coefficients.safetensors").read_bytes() == (
        family.folder / "c.safetensors"
    ).read_bytes()
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert [g["layer"] for g in report["coefficients"]["groups"]][:2] == [None, 0]
    assert "Learned coefficients" in (tmp_path / "out" / "merge_report.html").read_text()


def test_files_that_do_not_fit_are_refused_in_the_plan(family: Family) -> None:
    entries = write_coefficients(family, "column")
    place = family.folder / "c.safetensors"
    recipe = recipe_of(family)
    about = {"format": FORMAT, "form": "soup"}

    def plan_with(changed: dict[str, torch.Tensor], metadata: dict[str, str] = about) -> None:
        save_file({k: v.contiguous() for k, v in changed.items()}, place, metadata=metadata)
        make_plan(load_recipe(recipe))

    with pytest.raises(MismatchError, match=r"has no coefficients for it"):
        plan_with({k: v for k, v in entries.items() if k != "model.norm.weight"})
    with pytest.raises(MismatchError, match=r"for 2 sources, not 3"):
        plan_with({k: v[:2] for k, v in entries.items()})
    with pytest.raises(MismatchError, match=r"do not fit the shape \[16\]"):
        plan_with({**entries, "model.norm.weight": torch.zeros(3, 7)})
    with pytest.raises(CorruptFileError, match="is not a file of coefficients"):
        plan_with(entries, {"format": "pt"})
    with pytest.raises(CorruptFileError, match="float32"):
        plan_with({**entries, "model.norm.weight": torch.zeros(3, 16).half()})
    place.unlink()
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+: coefficients: no such file"):
        load_recipe(recipe)


def test_data_beside_coefficients_is_noted(family: Family) -> None:
    write_coefficients(family, "tensor")
    (family.folder / "rows.jsonl").write_text('{"text": "some"}')
    path = recipe_of(family)
    document = yaml.safe_load(path.read_text())
    document["models"][1]["data"] = "rows.jsonl"
    path.write_text(yaml.safe_dump(document))
    (warning,) = load_recipe(path).warnings
    assert "models[1].data: has no effect: the coefficients are given" in warning
    assert not preparations_of(make_plan(load_recipe(path)))


def test_task_vectors_need_a_base(family: Family) -> None:
    write_coefficients(family, "tensor", "task_vector")
    with pytest.raises(RecipeError, match="Add `base_model:`"):
        load_recipe(recipe_of(family, "soup"))


def test_read_model_sees_weights_alone(family: Family, tmp_path: Path) -> None:
    """coefficients.safetensors lies beside the weights and is never taken for some."""
    write_coefficients(family, "column")
    merge(recipe_of(family), tmp_path / "out")
    from merge_cli.recipe.reference import parse_reference
    from merge_cli.sources.opening import open_source

    source = open_source(parse_reference(str(tmp_path / "out"), tmp_path), tmp_path)
    assert set(source.tensors) == set(family.base)
    assert read_model(tmp_path / "out")
