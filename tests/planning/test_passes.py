"""The passes of `make_plan`, one by one, over headers that no file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.errors import MismatchError, RecipeError
from merge_cli.planning import planner
from merge_cli.planning.draft import Draft
from merge_cli.planning.method_checks import check_recipe
from merge_cli.planning.passes import (
    cut_slices,
    match_tensors,
    unify_copies,
    unify_heads,
    unify_layouts,
    unify_prefixes,
)
from merge_cli.planning.planner import load_recipe
from merge_cli.planning.tasks import decide_tasks
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary

Shapes = Mapping[str, tuple[int, ...]]
LINEAR = "merge_method: linear\nmodels:\n" + "".join(
    f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in "ab"
)
TASK = (
    "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n"
)
LAYERS: Shapes = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.mlp.up_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (4, 4),
    "model.norm.weight": (4,),
}
TIED: dict[str, Any] = {"tie_word_embeddings": True}


def source(label: str, shapes: Shapes, dtype: str = "BF16", **config: Any) -> Source:
    """A model of which there are headers alone."""
    root = Path("/nowhere") / label
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        size = width_of(dtype)
        for length in shape:
            size *= length
        tensors[name] = TensorRef(name, root / "model.safetensors", dtype, shape, offset, size)
        offset += size
    return Source(label, root, {"num_hidden_layers": 2, **config}, tensors, {})


def draft(text: str, *sources: Source) -> Draft:
    recipe = load_recipe("recipe.yaml", text=text)
    method = check_recipe(recipe).method
    assert method is not None
    return cut_slices(Draft(recipe, method, sources))


def matched(start: Draft) -> Draft:
    """With every tensor as its source has it."""
    tensors = tuple(source.tensors for source in start.sources)
    aligned = AlignedVocabulary(tensors, start.config_index)
    return match_tensors(replace(start, tensors=tensors, aligned=aligned))


def test_the_base_gives_config_and_names() -> None:
    based = draft(TASK, source("a", LAYERS), source("b", LAYERS))
    assert (based.base, based.reference, based.config_index) == (0, 0, 0)
    assert based.notes == ()


def test_without_a_base_the_first_model_gives_the_config_and_a_note_says_so() -> None:
    free = draft(LINEAR, source("a", LAYERS), source("b", LAYERS))
    assert (free.base, free.config_index) == (None, 0)
    assert free.notes == ("config.json and tokenizer come from a, listed first",)


def test_slices_start_where_the_last_one_ended() -> None:
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: a, layer_range: [0, {count}]}}]\n" for count in (2, 1)
    )
    stacked = draft(text, source("a", LAYERS))
    assert [part.start for part in stacked.slices] == [0, 2]
    assert [(part.first, part.last) for part in stacked.slices] == [(True, False), (False, True)]
    names = [match.name for match in matched(stacked).matches.matches]
    assert [name for name in names if ".layers." in name] == [
        f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)
    ]


def test_prefixes_become_those_of_the_reference() -> None:
    inner = {f"language_model.{name}": shape for name, shape in LAYERS.items()}
    renamed = unify_prefixes(draft(LINEAR, source("a", LAYERS), source("b", inner)))
    assert renamed.sources[1].tensors.keys() == LAYERS.keys()
    assert "by prefix: language_model.model. -> model." in renamed.notes[-1]


def test_experts_take_the_layout_of_the_reference() -> None:
    module = "model.layers.0.mlp.experts"
    stacked = {f"{module}.gate_up_proj": (2, 8, 4), f"{module}.down_proj": (2, 4, 4)}
    single = {
        f"{module}.{number}.{name}_proj.weight": (4, 4)
        for number in range(2)
        for name in ("gate", "up", "down")
    }
    relaid = unify_layouts(draft(LINEAR, source("a", stacked), source("b", single)))
    shapes = {name: tensor.shape for name, tensor in relaid.sources[1].tensors.items()}
    assert shapes == stacked


def test_a_source_lends_the_copy_that_it_has() -> None:
    both = {"shared.weight": (8, 4), "encoder.embed_tokens.weight": (8, 4)}
    one = {"shared.weight": (8, 4)}
    joined = unify_copies(draft(LINEAR, source("a", both), source("b", one)))
    assert joined.copy_of == {"encoder.embed_tokens.weight": "shared.weight"}
    assert joined.sources[1].tensors.keys() == both.keys()
    assert [(pair.first.name, pair.second.name) for pair in joined.compared] == [tuple(both)]


def test_heads_that_every_config_ties_are_left_out() -> None:
    headed = {**LAYERS, "lm_head.weight": (8, 4)}
    plain = unify_heads(draft(LINEAR, source("a", headed, **TIED), source("b", LAYERS, **TIED)))
    assert all("lm_head.weight" not in tensors for tensors in plain.tensors)
    assert plain.tied is None


def test_a_classifier_is_not_merged_with_a_language_model() -> None:
    classifier = source("a", {**LAYERS, "score.weight": (2, 4)})
    language = source("b", LAYERS, architectures=["LlamaForCausalLM"])
    with pytest.raises(MismatchError, match="is a language model"):
        unify_heads(draft(LINEAR, classifier, language))


def test_every_tensor_that_does_not_fit_is_reported_at_once() -> None:
    other = {**LAYERS, "model.norm.weight": (6,), "extra.weight": (1,)}
    del other["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(MismatchError) as error:
        matched(draft(LINEAR, source("a", LAYERS), source("b", other)))
    assert {problem.key for problem in error.value.problems} == {
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "extra.weight",
    }


def test_tasks_are_in_natural_order_and_of_the_wider_dtype() -> None:
    names = {f"model.layers.{layer}.mlp.up_proj.weight": (4, 4) for layer in (10, 2, 1)}
    start = draft(LINEAR, source("a", names), source("b", names, "F32"))
    decided = decide_tasks(matched(start))
    assert [task.name.split(".")[2] for task in decided.tasks] == ["1", "2", "10"]
    assert {(task.dtype, task.action) for task in decided.tasks} == {("F32", "merge")}
    assert "sources differ in dtype in 3 tensors" in decided.notes[-1]


def test_integers_are_copied_from_the_reference() -> None:
    ids = {"model.position_table": (4,)}
    decided = decide_tasks(matched(draft(LINEAR, source("a", ids, "I64"), source("b", ids, "I64"))))
    (task,) = decided.tasks
    assert (task.action, task.dtype, task.sources, task.moved) == ("copy", "I64", (0,), True)


def test_values_that_no_tensor_can_be_merged_with_are_reported_once() -> None:
    text = LINEAR.replace("weight: 1", "weight: 0")
    with pytest.raises(RecipeError) as error:
        decide_tasks(matched(draft(text, source("a", LAYERS), source("b", LAYERS))))
    assert len(error.value.problems) == 1


def test_each_pass_is_named_once() -> None:
    names = [decide.__name__ for decide in planner._PASSES]
    assert len(set(names)) == len(names)
    assert names.index("match_tensors") < names.index("decide_tasks") < names.index("merge_config")
