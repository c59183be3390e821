"""What mergekit 0.1.5 reads in a recipe, and how: each reading is a test, most of the plan alone.

Whether the numbers are mergekit's own is what scripts/fuzz_mergekit.py looks at, with both tools.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merge_cli
from merge_cli.errors import RecipeError
from merge_cli.recipe.fields import MERGEKIT_PARAMETERS
from merge_cli.recipe.tokenizer import BUILT_IN
from tests.support.tiny import Family, llama_family, merge, read_model, to_array
from tests.support.vocabularies import EMBED, bpe, pair, write

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return llama_family(tmp_path_factory.mktemp("family"), dtype=torch.float32, layers=3)


def parameters(family: Family, recipe: Path) -> dict[str, dict[str, Any]]:
    return {task.name: dict(task.parameters) for task in merge_cli.plan(recipe).tasks}


def warnings(recipe: Path) -> str:
    return "\n".join(merge_cli.load_recipe(recipe).warnings)


@pytest.mark.parametrize(
    ("method", "count"),
    [("linear", 3), ("slerp", 1), ("sce", 3), ("karcher", 3), ("passthrough", 1), ("ties", 3),
     ("task_arithmetic", 3), ("dare_ties", 3), ("nuslerp", 2), ("arcee_fusion", 1), ("ram", 3)],
)  # fmt: skip
def test_what_a_method_does_not_have_is_passed_by(models: Family, method: str, count: int) -> None:
    """Under a model as well as for the whole merge: one rule for all methods and parameters."""
    known = merge_cli.methods.registry.get_method(method).parameters
    foreign = {name: 0.5 for name in MERGEKIT_PARAMETERS - set(known)}
    recipe = models.recipe(method, base=method not in ("linear", "karcher", "passthrough"),
                           models=[foreign] * count, parameters=foreign)  # fmt: skip
    text = warnings(recipe)
    for name in foreign.keys() - {"int8_mask"}:
        for place in ("models[0].parameters", "parameters"):
            assert f" {place}.{name}: has no effect in {method}." in text
    assert merge_cli.plan(recipe).tasks
    wrong = models.recipe(method, models=[{"wieght": 1.0}] * count)
    with pytest.raises(RecipeError, match="has no such parameter"):
        merge_cli.load_recipe(wrong)


def test_a_shared_parameter_under_a_model_has_no_effect(models: Family) -> None:
    recipe = models.recipe("ties", models=[{"lambda": 0.1, "normalize": "maybe"}, None])
    assert "models[0].parameters.lambda: has no effect under a model" in warnings(recipe)
    assert {p["lambda"] for p in parameters(models, recipe).values()} == {1.0}


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(1, True), (0, False), (1.0, True), (0.0, False), ("true", True), ("off", False)],
)
def test_truth_is_written_as_numbers(models: Family, value: Any, meaning: bool) -> None:
    recipe = models.recipe("ties", parameters={"normalize": value, "rescale": value})
    found = next(iter(parameters(models, recipe).values()))
    assert (found["normalize"], found["rescale"]) == (meaning, meaning)


def test_truth_steps_where_numbers_would_be_interpolated(models: Family) -> None:
    found = parameters(models, models.recipe("ties", parameters={"normalize": [1, 0]}))
    assert [found[UP.format(i)]["normalize"] for i in range(3)] == [True, True, False]
    with pytest.raises(RecipeError, match="must be true or false"):
        merge_cli.load_recipe(models.recipe("ties", parameters={"normalize": [1, 0.5]}))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "della", "breadcrumbs"])
def test_densities_beyond_their_range(models: Family, tmp_path: Path, method: str) -> None:
    more = models.recipe(method, models=[{"density": 1.5}] * 2)
    assert "density: is read as 1 where it is more." in warnings(more)
    assert all(p["density"] == [1.0, 1.0] for p in parameters(models, more).values())
    nothing = merge(models.recipe(method, models=[{"density": 0}] * 2), tmp_path / "out")
    assert all(torch.equal(value, models.base[name]) for name, value in nothing.items())


def test_any_density_keeps_an_element(models: Family, tmp_path: Path) -> None:
    merged = merge(models.recipe("ties", models=[{"density": 1e-9}]), tmp_path / "out")
    name = "model.norm.weight"
    assert int((merged[name] != models.base[name]).sum()) == 1
    change = (models.models[0][name] - models.base[name]).abs()
    assert int((merged[name] - models.base[name]).abs().argmax()) == int(change.argmax())


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("compiled", [True, False])
def test_rescale_keeps_the_l1_norm(
    models: Family, tmp_path: Path, method: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("merge_cli.kernels.compiled.available", lambda: "not here")
    given = {"density": 0.5, "gamma": 0.1} if "bread" in method else {"density": 0.5}
    made = {}
    for rescale in (True, False):
        recipe = models.recipe(method, models=[given], parameters={"rescale": rescale})
        made[rescale] = merge(recipe, tmp_path / str(rescale))
    for name, base in models.base.items():
        whole = to_array(models.models[0][name]) - to_array(base)
        kept = to_array(made[False][name]) - to_array(base)
        factor = np.abs(whole).sum() / np.abs(kept).sum()
        found = to_array(made[True][name]) - to_array(base)
        np.testing.assert_allclose(found, kept * factor, atol=1e-6)


def test_one_layer_takes_the_last_value_of_a_gradient(models: Family, tmp_path: Path) -> None:
    def piece(low: int, high: int) -> dict[str, Any]:
        return {"sources": [{"model": m, "layer_range": [low, high]} for m in ("a", "b")]}

    recipe = models.write({"merge_method": "slerp", "base_model": "a", "parameters": {"t": [0, 1]},
                           "slices": [piece(0, 1), piece(0, 3)]})  # fmt: skip
    found = parameters(models, recipe)
    assert [found[UP.format(i)]["t"] for i in range(4)] == [1, 0, 0.5, 1]
    assert found["model.embed_tokens.weight"]["t"] == 0
    one = llama_family(tmp_path, layers=1)
    found = parameters(one, one.recipe("linear", base=False, models=[{"weight": [0.5, 1]}] * 2))
    assert found[UP.format(0)]["weight"] == [1, 1]


def test_filters_of_what_each_model_has_look_at_its_own_layers(models: Family) -> None:
    """Wherever they stand: mergekit resolves such parameters by the name in the source."""
    rules = [{"filter": "layers.2.", "value": 2.0}, {"value": 1.0}]
    sources = [{"model": "a", "layer_range": [1, 3], "parameters": {"weight": rules}},
               {"model": "b", "layer_range": [0, 2]}]  # fmt: skip
    normalize = [{"filter": "layers.1.", "value": False}, {"value": True}]
    shared = {"weight": rules, "normalize": normalize}
    recipe = models.write(
        {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": shared}
    )
    plan = merge_cli.plan(recipe)
    found = {task.name: task.parameters for task in plan.tasks}
    assert [found[UP.format(i)]["weight"] for i in range(2)] == [[1.0, 1.0], [2.0, 1.0]]
    assert [found[UP.format(i)]["normalize"] for i in range(2)] == [True, False]
    assert not any("matches no tensor" in note for note in plan.notes)


def test_an_unlisted_base_is_averaged(models: Family, tmp_path: Path) -> None:
    recipe = models.recipe("linear", models=[{"weight": 3.0}], parameters={"weight": 1.0})
    assert "base_model: averaged with the models, as in mergekit." in warnings(recipe)
    merged = merge(recipe, tmp_path / "out")
    base, (a, *_) = models.arrays(UP.format(0))
    np.testing.assert_allclose(to_array(merged[UP.format(0)]), (3 * a + base) / 4, atol=1e-6)
    again = merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in merged.items())
    assert len(merge_cli.plan(models.recipe("karcher")).operands) == 4
    listed = models.write({"merge_method": "karcher", "base_model": "base",
                           "models": ["base", "a"]})  # fmt: skip
    assert len(merge_cli.plan(listed).operands) == 2


def test_linear_needs_a_weight_for_an_unlisted_base(models: Family, tmp_path: Path) -> None:
    """mergekit refuses the recipe; here the base provides config and tokenizer only, as a note."""
    recipe = models.recipe("linear", models=[{"weight": 1.0}] * 2)
    assert "base_model: provides config and tokenizer only. It is not averaged" in warnings(recipe)
    merged = merge(recipe, tmp_path / "out")
    _, (a, b, _) = models.arrays(UP.format(0))
    np.testing.assert_allclose(to_array(merged[UP.format(0)]), (a + b) / 2, atol=1e-6)
    again = merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in merged.items())


def test_karcher_has_weights_when_asked(models: Family, tmp_path: Path) -> None:
    weights = [{"weight": 0.9}, {"weight": 0.1}]
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (weights, {}), ([None, None], {}), (weights, {"parameters": {"weighted": True}}),
    ]  # fmt: skip
    made = [
        merge(models.recipe("karcher", base=False, models=given, **more), tmp_path / str(i))
        for i, (given, more) in enumerate(kinds)
    ]
    name = UP.format(0)
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[2][name], made[1][name])


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "breadcrumbs"])
def test_weights_of_task_vectors_that_cancel(models: Family, tmp_path: Path, method: str) -> None:
    recipe = models.recipe(method, models=[{"weight": 0.5}, {"weight": -0.5}],
                           parameters={"normalize": True})  # fmt: skip
    merged = merge(recipe, tmp_path / "out")
    base, (a, b, _) = models.arrays(UP.format(0))
    expected = base + (a - b) / 2
    np.testing.assert_allclose(to_array(merged[UP.format(0)]), expected, atol=1e-6)


def test_keys_that_stand_in_published_recipes(models: Family) -> None:
    recipe = models.write(
        "defaults: &d {weight: 0.5}\nnames:\n  first: &a a\nmerge_method: linear\nslices: null\n"
        "modules:\nrandom_seed: 7\ndtype: null\nseed: null\nmodels:\n"
        "- {model: *a, layer_range: [0, 3], parameters: *d}\n- {model: b, parameters: {<<: *d}}\n"
    )
    text = warnings(recipe)
    assert "r.yaml" not in text
    assert "recipe.yaml:1:1: defaults: has no effect (it holds" in text
    assert "recipe.yaml:2:1: names: has no effect (it holds" in text
    assert "models[0].layer_range: has no effect" in text
    assert merge_cli.load_recipe(recipe).seed == 7
    assert merge_cli.plan(recipe).tasks


@pytest.mark.parametrize(
    "line",
    ["modls: [a, b]", "paramaters: &p {weight: 1}", "x: [&y 1, *y]", "randm_seed: 1"],
)
def test_words_that_nobody_knows_stay_errors(models: Family, line: str) -> None:
    recipe = models.write(f"{line}\nmerge_method: linear\nmodels: [a, b]\n")
    with pytest.raises(RecipeError, match="unknown key"):
        merge_cli.load_recipe(recipe)


def test_both_seeds(models: Family) -> None:
    recipe = models.write("merge_method: linear\nmodels: [a]\nseed: 3\nrandom_seed: 4\n")
    assert merge_cli.load_recipe(recipe).seed == 3
    assert "random_seed: has no effect (`seed` says it)" in warnings(recipe)


def test_the_tokenizer_of_a_model_that_is_not_merged(tmp_path: Path) -> None:
    """By token: what no merged model has is zeros. It may have no weights."""
    one, *_ = pair(tmp_path)
    guest = bpe(["other words are here", "a b c"], 40)
    write(tmp_path / "guest", guest, 9)
    (tmp_path / "guest" / "model.safetensors").unlink()
    shutil.copy(tmp_path / "guest" / "tokenizer.json", tmp_path / "tokenizer.json")
    text = "merge_method: linear\nmodels: [base]\ntokenizer_source: guest\n"
    (tmp_path / "r.yaml").write_text(text)
    plan = merge_cli.plan(tmp_path / "r.yaml")
    assert "tokenizer: guest's, a model that is not merged" in plan.notes
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    words = guest.get_vocab()
    assert len(merged[EMBED]) == len(words)
    own, theirs = one.get_vocab(), read_model(tmp_path / "base")[EMBED]
    for token, number in words.items():
        row = theirs[own[token]] if token in own else torch.zeros_like(theirs[0])
        assert torch.equal(merged[EMBED][number], row), token
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "tokenizer.json"
    ).read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.yaml").write_text(text.replace("guest", "./empty"))
    with pytest.raises(RecipeError, match="has no tokenizer") as caught:
        merge_cli.plan(tmp_path / "r.yaml")
    assert caught.value.problems[0].line == 3


@pytest.mark.parametrize("line", ["tokenizer_source: base", "tokenizer: base"])
def test_the_bases_tokenizer_without_a_base(tmp_path: Path, line: str) -> None:
    pair(tmp_path)
    (tmp_path / "r.yaml").write_text(f"merge_method: linear\nmodels: [chat, base]\n{line}\n")
    plan = merge_cli.plan(tmp_path / "r.yaml")
    assert plan.sources[plan.tokenizer_index].label == "chat"
    assert any("no base_model; taken from chat" in note for note in plan.notes)


def test_padding_is_the_mean_of_the_tokens(tmp_path: Path) -> None:
    tokenizer, *_ = pair(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nmodels: [base]\ndtype: float32\n"
        "tokenizer: {source: base, pad_to_multiple_of: 128}\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    theirs = read_model(tmp_path / "base")[EMBED].float()
    assert len(merged[EMBED]) == 128 > len(theirs)
    count = tokenizer.get_vocab_size()
    mean = theirs[:count].mean(0)
    torch.testing.assert_close(merged[EMBED][-1], mean)
    assert torch.equal(merged[EMBED][len(theirs)], merged[EMBED][-1])
    again = merge(tmp_path / "r.yaml", tmp_path / "small", shard_size=4000, threads=3)
    assert all(torch.equal(again[name], value) for name, value in merged.items())


def test_vocabularies_are_cut_when_asked(tmp_path: Path) -> None:
    pair(tmp_path)
    text = "merge_method: linear\nmodels: [base, chat]\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(merge_cli.errors.MismatchError, match="vocabularies differ"):
        merge_cli.plan(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(text + "tokenizer: {truncate: true}\ndtype: float32\n")
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    a, b = (read_model(tmp_path / name)[EMBED].float() for name in ("base", "chat"))
    rows = min(len(a), len(b))
    torch.testing.assert_close(merged[EMBED], (a[:rows] + b[:rows]) / 2)
    assert f'"vocab_size": {rows}' in (tmp_path / "out" / "config.json").read_text()
    assert "truncate: true" in (tmp_path / "out" / "merge_recipe.yaml").read_text()


SAID = (("system", "Be brief. "), ("user", "Hi"), ("assistant", "Yes?"), ("user", " Bye\n"))
TALK = [{"role": role, "content": content} for role, content in SAID]
SHOWN = {
    "chatml": "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n Bye\n<|im_end|>\n"
    "<|im_start|>assistant\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye"
    "### Response:\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief. \n\nHi [/INST] Yes?</s> [INST]  Bye\n [/INST]",
    "exaone": "    [|system|]Be brief. \n        [|endofturn|]\n\n    [|user|]Hi\n        \n\n"
    "    [|assistant|]Yes?\n        [|endofturn|]\n\n    [|user|] Bye\n\n        \n\n"
    "    [|assistant|]\n",
}


def test_the_union_leaves_out_tokens_without_a_row(tmp_path: Path) -> None:
    tokenizer = bpe(["some words are here"], 30)
    write(tmp_path / "base", tokenizer, 1)
    more = bpe(["some words are here"], 30)
    more.add_tokens(["<kept>", "<unused>"])
    rows = tokenizer.get_vocab_size() + 1
    write(tmp_path / "chat", more, 2, rows=rows)
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nbase_model: base\nmodels: [base, chat]\ntokenizer_source: union\n"
    )
    plan = merge_cli.plan(tmp_path / "r.yaml")
    assert "tokenizer: 1 tokens of chat have no row and are left out" in plan.notes
    assert plan.aligned.rows == rows


def test_an_epsilon_of_zero(models: Family, tmp_path: Path) -> None:
    """A model that shares all that it has changed: no share of what it has alone."""
    recipe = models.recipe("ramplus_tl", models=[None, None], parameters={"epsilon": 0})
    merged = merge(recipe, tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in merged.values())


def test_one_model_alone_is_the_mean_direction(models: Family, tmp_path: Path) -> None:
    recipe = models.recipe("multislerp", base=False, models=[{"weight": 0}])
    merged = merge(recipe, tmp_path / "out")
    assert all(torch.equal(merged[name], value) for name, value in models.models[0].items())


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della", "della_linear"])
def test_what_rescaling_at_random_means_is_said(models: Family, method: str) -> None:
    def said(**keys: Any) -> bool:
        recipe = models.recipe(method, models=[{"density": keys.pop("density")}],
                               parameters=keys)  # fmt: skip
        return "mergekit by L1 norms" in warnings(recipe)

    assert said(density=0.5)
    assert said(density=[1, 0.5], rescale=True)
    assert not said(density=1)
    assert not said(density=0.5, rescale=False)
    assert not said(density=0.5, rescale="l1")


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("trim", [True, False])
def test_templates_render_as_mergekits(name: str, trim: bool) -> None:
    """However a program sets Jinja up; the texts are what mergekit's own templates gave."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if name == "chatml" and not trim:
        pytest.skip("its line breaks are text, which only a trimming Jinja keeps as they are")
    jinja = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    template = jinja.from_string(BUILT_IN[name])
    shown = template.render(messages=TALK, add_generation_prompt=True, bos_token="<s>",
                            eos_token="</s>")  # fmt: skip
    assert shown == SHOWN[name]
