"""Recipes as Python mappings: the same as files, and mistakes without made-up lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import merge_cli
from merge_cli.errors import RecipeError
from merge_cli.planning.planner import load_recipe
from tests.support.tiny import Family, read_model


def document(folder: Path) -> dict[str, Any]:
    first = {"model": str(folder / "a"), "parameters": {"weight": [0.3, 1e-5]}}
    return {
        "merge_method": "ties",
        "base_model": folder / "base",
        "models": (first, folder / "b"),
        "parameters": {"density": 0.5, "normalize": True},
        "dtype": "bfloat16",
    }


def test_a_mapping_merges_as_its_file_does(family: Family, tmp_path: Path) -> None:
    file = family.write(
        "merge_method: ties\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: [0.3, 1.0e-5]}}, b]\n"
        "parameters: {density: 0.5, normalize: true}\ndtype: bfloat16\n"
    )
    mapping = document(family.folder)
    result = merge_cli.merge(mapping, tmp_path / "of-mapping")
    expected = read_model(merge_cli.merge(file, tmp_path / "of-file").path)
    found = read_model(result.path)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert mapping == document(family.folder)
    assert merge_cli.plan(mapping).method.name == "ties"


def test_relative_paths_start_at_the_working_directory(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.folder)
    plan = merge_cli.plan({"merge_method": "soup", "models": ["a", "b"]})
    assert [source.root.name for source in plan.sources] == ["a", "b"]


@pytest.mark.parametrize(
    ("recipe", "problems"),
    [
        (
            {"merge_method": "tis", "models": ["a", "b"], "dtpe": "bfloat16"},
            ["dtpe: unknown key", "merge_method: unknown merge method 'tis'"],
        ),
        ({"merge_method": "soup", "models": {1: "a"}}, ["models: a key must be text (got 1)"]),
        ({"merge_method": "soup", "models": [{"a"}]}, ["models[0]: must be plain data"]),
        (
            {"merge_method": "soup", "models": ["a", "b"], "dtype": float("nan")},
            ["dtype: not a finite number"],
        ),
        ({}, ["merge_method: missing", "models: missing"]),
    ],
)
def test_mistakes_are_named_by_their_keys(recipe: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe)
    shown = sorted(map(str, error.value.problems))
    assert len(shown) == len(problems)
    for text, expected in zip(shown, problems, strict=True):
        assert text.startswith(expected)
    assert {(p.file, p.line, p.column) for p in error.value.problems} == {("", 0, 0)}


def test_what_contains_itself_is_refused() -> None:
    models: list[Any] = ["a"]
    models.append(models)
    with pytest.raises(RecipeError, match=r"models\[1\]: contains itself"):
        load_recipe({"merge_method": "soup", "models": models})


def test_one_list_in_two_places_is_two_lists() -> None:
    weights = [0.1, 0.9]
    models = [{"model": name, "parameters": {"weight": weights}} for name in "ab"]
    recipe = load_recipe({"merge_method": "soup", "models": models})
    assert len(recipe.models) == 2


def test_warnings_name_the_key_alone(family: Family) -> None:
    a, b = str(family.folder / "a"), str(family.folder / "b")
    base = str(family.folder / "base")
    recipe = load_recipe({"merge_method": "soup", "models": [a, b], "base_model": base})
    assert [w for w in recipe.warnings if w.startswith("base_model: ")] == list(recipe.warnings)
    assert recipe.warnings
