"""Filters of parameters: parts of names, regular expressions, globs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merge_cli
from merge_cli.errors import RecipeError
from merge_cli.planning.planner import load_recipe
from merge_cli.recipe.values import Rule, evaluate, filter_error, matches
from merge_cli.system import patterns
from tests.support.tiny import Family

NAME = "model.layers.7.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("filter", "meant"),
    [
        ("self_attn", True),
        ("layers.7.", True),
        ("mlp", False),
        ("Self_attn", False),
        (".weight", True),
        ("[qk]_proj", False),  # a part of a name, and no name has brackets
        ("/[qk]_proj/", True),
        ("/^model\\.layers\\.[0-9]\\./", True),
        ("/^layers/", False),
        ("/(mlp|self_attn)\\.[qkv]_/", True),
        ("/weight$/", True),
        ("model.layers.*.self_attn.*", True),
        ("model.layers.?.self_attn.[qk]_proj.weight", True),
        ("model.layers.??.*", False),
        ("self_attn*", False),  # the whole name, not a part
        ("*self_attn*", True),
        ("*.bias", False),
        ("/", False),
        ("//", False),
    ],
)
def test_what_a_filter_means(filter: str, meant: bool) -> None:
    assert matches(filter, NAME) is meant
    assert filter_error(filter) == ""


@pytest.mark.parametrize(
    ("filter", "name", "meant"),
    [
        ("mlp", "block_sparse_moe.experts.3.w1", True),
        ("mlp.gate.", "block_sparse_moe.gate", True),
        ("block_sparse_moe", "block_sparse_moe.gate", True),
        ("mlp.experts.gate_up_proj", "block_sparse_moe.experts.3.w3", True),
        ("mlp.experts.gate_up_proj", "mlp.experts.3.up_proj", True),
        ("down_proj", "block_sparse_moe.experts.3.w2", True),
        ("gate", "block_sparse_moe.experts.3.w2", False),
        ("*.mlp.experts.down_proj", "block_sparse_moe.experts.0.w2", True),
        ("/mlp\\.experts\\.gate/", "mlp.experts.0.gate_proj", True),
        ("gate_up_proj", "mlp.gate_proj", False),  # which is stored and kept as it is
        ("w1", "mlp.experts.3.gate_proj", False),
    ],
)
def test_experts_go_by_their_names_of_transformers_5_too(
    filter: str, name: str, meant: bool
) -> None:
    assert matches(filter, f"model.layers.7.{name}.weight") is meant


def test_the_commonest_filter_means_the_experts_of_mixtral(tmp_path: Path) -> None:
    names = ["block_sparse_moe.gate", "block_sparse_moe.experts.0.w1", "self_attn.q_proj"]
    for model in "ab":
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text('{"num_hidden_layers": 1}')
        stored = {f"model.layers.0.{name}.weight": torch.ones(4, 4) for name in names}
        save_file(stored, tmp_path / model / "model.safetensors", {"format": "pt"})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
        "  - model: b\n    parameters: {weight: [{filter: mlp, value: 0.25}, {value: 0.75}]}\n"
    )
    plan = merge_cli.plan(recipe)
    weights = {task.name.split(".")[3]: task.parameters["weight"][1] for task in plan.tasks}
    assert weights == {"block_sparse_moe": 0.25, "self_attn": 0.75}
    assert not [note for note in plan.notes if "filter" in note]


def test_a_star_is_everything() -> None:
    rules = (Rule("/mlp/", 1.0), Rule("*", 2.0))
    assert evaluate(rules, NAME, 0.0) == 2.0
    assert evaluate(rules, NAME.replace("self_attn", "mlp"), 0.0) == 1.0


def scaled(family: Family, scale: Any) -> dict[str, Any]:
    recipe = family.recipe("passthrough", base=False, models=[{"scale": scale}])
    return {task.name: task.parameters["scale"][0] for task in merge_cli.plan(recipe).tasks}


def test_each_kind_in_a_recipe(family: Family) -> None:
    found = scaled(
        family,
        [
            {"filter": "/layers\\.[02]\\..*proj/", "value": [0.0, 9.0]},
            {"filter": "model.layers.*.mlp.*", "value": 0.5},
            {"filter": "norm", "value": 2.0},
        ],
    )
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.0
    assert found["model.layers.2.self_attn.q_proj.weight"] == pytest.approx(6.0)
    assert found["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.1.input_layernorm.weight"] == 2.0
    assert found["model.embed_tokens.weight"] == 1.0


def test_an_expression_that_is_none_is_told_where_it_stands(family: Family) -> None:
    text = (
        "merge_method: passthrough\nmodels:\n  - model: a\n    parameters:\n      scale:\n"
        "        - {filter: '/mlp(/', value: 0.5}\n        - {filter: 'x[', value: 1}\n"
        "        - value: 1\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(family.write(text))
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (6, 20)
    assert "not a regular expression: missing ), unterminated subpattern" in problem.message
    assert problem.message.endswith("at character 5 of the filter")


def test_a_filter_of_a_search_is_checked_too(family: Family) -> None:
    recipe = family.recipe(
        "evolutionary",
        search={
            "method": "task_arithmetic",
            "parameters": {"weight": {"min": 0, "max": 1}},
            "filters": ["mlp", "/*/"],
        },
        objective=[{"task": "loss", "data": "x.jsonl"}],
    )
    with pytest.raises(RecipeError, match="nothing to repeat"):
        load_recipe(recipe)


def test_filters_that_match_nothing_are_noted(family: Family) -> None:
    recipe = family.recipe(
        "passthrough",
        base=False,
        models=[{"scale": [{"filter": "self_atn", "value": 0.0}, {"filter": "mlp", "value": 2.0}]}],
    )
    notes = [note for note in merge_cli.plan(recipe).notes if "filter" in note]
    assert notes == [
        "models[0].parameters.scale, line 5 of the recipe: the filter 'self_atn' matches no tensor "
        "and has no effect"
    ]


@pytest.mark.parametrize(
    ("rules", "warned"),
    [
        ([{"value": 0}, {"filter": "mlp", "value": 1}],
         ["the filter mlp stands after a value for all tensors"]),
        ([{"filter": "*", "value": 0}, 0.5, {"filter": "/x/", "value": 1}],
         ["a value for all tensors stands after", "the filter /x/ stands after a value"]),
        ([{"filter": "mlp", "value": 0}, {"filter": "mlp.down", "value": 1}, {"value": 0.5}],
         ["the filter mlp.down stands after the filter mlp"]),
        ([{"filter": "*mlp*", "value": 0}, {"filter": "*mlp*", "value": 1}, 0.5],
         ["the filter *mlp* stands after the filter *mlp*"]),
        ([{"filter": "down", "value": 0}, {"filter": "mlp", "value": 1}, {"value": 0.5}], []),
        ([{"filter": "/mlp/", "value": 0}, {"filter": "mlp", "value": 1}, {"value": 0.5}], []),
        ([{"filter": "mlp.down", "value": 0}, {"filter": "mlp", "value": 1}, {"value": 0.5}], []),
    ],
)  # fmt: skip
def test_rules_that_never_decide_are_warned_of(
    family: Family, rules: list[Any], warned: list[str]
) -> None:
    """The first that matches decides, here and in mergekit."""
    recipe = load_recipe(family.recipe("linear", models=[{"weight": rules}] * 3))
    lines = [line for line in recipe.warnings if "models[0].parameters.weight" in line]
    assert len(lines) == len(warned)
    for line, words in zip(lines, warned, strict=True):
        assert "has no effect" in line
        assert words in line
        assert line.startswith(f"{recipe.file}:")


def test_the_resolved_recipe_keeps_them(family: Family) -> None:
    scale = [{"filter": "/q_|k_/", "value": 0.5}, {"filter": "*.mlp.*", "value": 2.0}]
    recipe = family.recipe("passthrough", base=False, models=[{"scale": scale}])
    out = merge_cli.merge(recipe, family.folder / "out").path
    again = merge_cli.merge(out / "merge_recipe.yaml", family.folder / "again").path
    name = "model.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes()


def test_filters_that_would_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.3)
    patterns.compile_pattern.cache_clear()
    assert matches("/(\\.\\w+)+t$/", "model.layers.0" + ".mlp" * 40 + ".weight")
    assert not matches("*a*a*a*a*a*a*b", "a" * 200)
    with pytest.raises(RecipeError, match="is an expression that takes too long to match"):
        matches("/(a|aa)+$/", "a" * 300 + ".")
