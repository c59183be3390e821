"""What mergekit 0.1.5 gets wrong, and what happens here: each row of the list is a test.

Where a subject has tests of its own, the row points to them.
"""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import merge_cli
from merge_cli.cli import app
from merge_cli.errors import MismatchError, RecipeError, UsageError
from tests.support.paths import TESTS
from tests.support.tiny import (
    Family,
    llama_config,
    llama_tensors,
    merge,
    read_model,
    to_array,
    write_model,
)
from tests.support.vocabularies import pair


def test_a_misspelt_key_is_refused_with_its_place(family: Family) -> None:
    recipe = family.recipe("ties", models=[{"densty": 0.5}, None])
    with pytest.raises(RecipeError) as caught:
        merge_cli.plan(recipe)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (6, 5)
    assert str(problem).endswith(
        "models[0].parameters.densty: ties has no such parameter. Did you mean 'density'?"
    )


def test_weights_that_sum_to_zero_are_refused_in_the_plan(family: Family) -> None:
    recipe = family.recipe("linear", base=False, models=[{"weight": 1.0}, {"weight": -1.0}])
    with pytest.raises(RecipeError, match="sum to 0"):
        merge_cli.plan(recipe)


def test_a_tensor_of_no_known_architecture_is_merged(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.novel_adapter.gate"
    for model in ("a", "b"):
        tensors = llama_tensors(generator, layers=1)
        tensors[name] = torch.randn(3, 5, generator=generator)
        write_model(tmp_path / model, tensors, llama_config(layers=1) | {"model_type": "unheard"})
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [a, b]\n")
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    a, b = (to_array(read_model(tmp_path / model)[name]) for model in ("a", "b"))
    assert np.allclose(to_array(merged[name]), (a + b) / 2)


def test_an_encoder_works(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {
        "bert.embeddings.word_embeddings.weight": (20, 8),
        "bert.embeddings.LayerNorm.weight": (8,),
        **{f"bert.encoder.layer.{i}.attention.self.query.weight": (8, 8) for i in range(2)},
        "bert.pooler.dense.bias": (8,),
        "classifier.weight": (2, 8),
    }
    for model in ("a", "b"):
        tensors = {n: torch.randn(*shape, generator=generator) for n, shape in names.items()}
        about = {"model_type": "bert", "num_hidden_layers": 2}
        write_model(tmp_path / model, tensors, about)
    (tmp_path / "r.yaml").write_text(
        "merge_method: slerp\nbase_model: a\nmodels: [b]\nparameters: {t: [0, 1]}\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    last = "bert.encoder.layer.1.attention.self.query.weight"
    assert merged.keys() == names.keys()
    assert torch.allclose(merged[last], read_model(tmp_path / "b")[last])


def test_without_a_base_the_first_model_gives_the_config(family: Family) -> None:
    plan = merge_cli.plan(family.write("merge_method: linear\nmodels: [b, a]\n"))
    assert plan.sources[plan.config_index].label == "b"
    assert "config.json and tokenizer come from b, listed first" in plan.notes


def test_dare_has_a_seed_that_is_recorded(family: Family) -> None:
    recipe = family.recipe("dare_ties", models=[{"density": 0.5, "weight": 1.0}] * 2)
    first, second = merge(recipe, family.folder / "x"), merge(recipe, family.folder / "y")
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert "seed: 0" in (family.folder / "x" / "merge_recipe.yaml").read_text()


def test_a_density_is_what_the_recipe_says(family: Family) -> None:
    """bfloat16 would make 0.53 to 0.53125."""
    recipe = family.recipe("ties", models=[{"density": 0.53, "weight": 1.0}], dtype="float32")
    merged = merge(recipe, family.folder / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    base, (a, *_) = family.arrays(name)
    kept = np.count_nonzero(to_array(merged[name]) != base)
    assert kept == min(int(0.53 * base.size), np.count_nonzero(a - base))


def test_a_tied_base_with_an_untied_source_is_reconciled(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for model, tied in (("base", True), ("a", False)):
        tensors = llama_tensors(generator, layers=1, tied=tied)
        write_model(tmp_path / model, tensors, llama_config(layers=1, tied=tied))
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [a]\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    head = read_model(tmp_path / "a")["lm_head.weight"]
    assert torch.allclose(merged["lm_head.weight"], head, atol=1e-6)


def test_an_output_that_was_used_before(family: Family) -> None:
    recipe, out = family.recipe("linear", base=False), family.folder / "out"
    merge(recipe, out, shard_size=4000)
    with pytest.raises(UsageError, match="exists already"):
        merge(recipe, out)
    merge(recipe, out, overwrite=True)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("size", ["5GB", "1.5B", "5B", "200M", "8KB"])
def test_shard_sizes_of_either_kind(family: Family, size: str) -> None:
    command = ["run", str(family.recipe("linear", base=False)), str(family.folder / "out")]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--out-shard-size", size])
    assert result.exit_code == 0, result.output
    shards = list((family.folder / "out").glob("*.safetensors"))
    assert len(shards) == 1 if size != "8KB" else len(shards) > 1


def test_relative_paths_are_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, offline: tokenizer, card and all."""
    pair(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [./base, ./other]\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = merge_cli.merge(Path("../r.yaml"), Path("out")).path
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "tokenizer.json", "tokenizer_config.json", "config.json"} <= names
    missing = "merge_method: linear\nmodels: [./base, ./othr]\n"
    (tmp_path / "r.yaml").write_text(missing)
    with pytest.raises(merge_cli.errors.SourceError, match="Did you mean './other'"):
        merge_cli.merge(Path("../r.yaml"), Path("again"))
    assert not Path("again").exists()


def test_generation_settings_survive_another_tokenizer(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nbase_model: base\nmodels: [base, chat]\ntokenizer_source: union\n"
    )
    merge(tmp_path / "r.yaml", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["temperature"] == 0.7


def test_rows_beyond_the_tokenizer_are_kept(tmp_path: Path) -> None:
    _, _, one, _ = pair(tmp_path, rows=128)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nbase_model: base\nmodels: [base]\ntokenizer_source: base\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    assert len(merged["model.embed_tokens.weight"]) == 128 == len(one["model.embed_tokens.weight"])


def test_all_problems_at_once_before_anything_is_read(family: Family) -> None:
    recipe = family.write(
        "merge_method: ties\nbase_mdel: base\nmodels:\n"
        "  - {model: a, parameters: {density: -1.5}}\n  - {model: b, parameters: {wieght: 1}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        merge_cli.plan(recipe)
    assert [problem.line for problem in caught.value.problems] == [1, 2, 4, 5]
    for name in ("a", "b"):
        shutil.rmtree(family.folder / name)
    with pytest.raises(MismatchError, match="2 models cannot be opened"):
        merge_cli.plan(family.recipe("ties"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("genome: {models: [a, b]}\ntasks: []\n", "a file of mergekit-evolve"),
        ("experts: [{source_model: a}]\nbase_model: base\n", "a file of mergekit-moe"),
        ("layer_slices: []\n", "a file of bakllama"),
    ],
)
def test_files_of_other_commands_are_told_what_they_are(
    family: Family, text: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        merge_cli.plan(family.write(text))


# What users have asked mergekit's maintainers for: the number, and where it is tested.
ELSEWHERE = {
    "interrupted": "whole/test_failures.py::test_killed_and_resumed",
    "start-up": "cli/test_app.py::test_starts_without_heavy_imports",
    "#47 vocabularies of different sizes": "planning/test_plan.py::test_shapes_and_vocabularies",
    "#139 union of vocabularies": "tokenizer/test_vocabularies.py::test_union_row_by_row",
    "#342 rules for tokens": "tokenizer/test_vocabularies.py::test_rules_for_single_tokens",
    "#425 padding": "tokenizer/test_vocabularies.py::test_padding_is_kept_or_made",
    "#20 #107 #549 memory": "engine/test_executor.py::test_memory_is_planned",
    "#329 #388 one core": "engine/test_executor.py::test_threads_window_and_shards",
    "#364 no resume": "engine/test_executor.py::test_interrupted_and_resumed",
    "#385 lm_head": "planning/test_plan.py::test_redundant_heads_are_left_out",
    "#460 #625 #434 #576 architectures": "planning/test_plan.py::test_layers_are_found_in_names",
    "#411 #258 DARE's seed": "engine/test_executor.py::test_seed_changes_dare_and_is_recorded",
    "#442 #470 LoRA": "lora/test_adapter.py::test_an_adapter_is_what_peft_merges",
    "#75 quantised": "formats/test_fp8.py::test_other_quantisation_is_refused_with_what_to_do",
}


@pytest.mark.parametrize("row", ELSEWHERE)
def test_rows_with_tests_of_their_own(row: str) -> None:
    file, _, name = ELSEWHERE[row].partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
