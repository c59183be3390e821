"""Recipes: mergekit's grammar, and every mistake with its place and the nearest word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_cli.errors import RecipeError, UsageError
from merge_cli.methods.blocks import operand_specs
from merge_cli.methods.registry import get_method
from merge_cli.planning import resolve as resolve_module
from merge_cli.planning.planner import load_recipe
from merge_cli.planning.resolve import resolve
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.values import Gradient, Rule, evaluate, interpolate
from tests.support import oracles

TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters:
      weight: 1.0
      density: 0.5
  - model: org/b
parameters:
  normalize: true
"""


def load(text: str) -> Recipe:
    return load_recipe("r.yaml", text=text)


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load(text)
    return [str(problem) for problem in raised.value.problems]


def test_a_recipe() -> None:
    recipe = load(TIES)
    assert recipe.base_model == ModelRef("org/base")
    assert [str(s.model) for s in recipe.models] == ["org/a", "org/b"]
    assert recipe.seed == 0
    assert recipe.output_dtype is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("density: 0.5", "densty: 0.5",
         "r.yaml:7:7: models[0].parameters.densty: ties has no such parameter. "
         "Did you mean 'density'?"),
        ("normalize", "Normalise", "r.yaml:10:3: parameters.Normalise: ties has no such parameter. "
         "Did you mean 'normalize'?"),
        ("density: 0.5", "density: -0.1",
         "r.yaml:7:7: models[0].parameters.density: must be a number of at least 0 (above 1 counts "
         "as 1) (got -0.1)."),
        ("density: 0.5", "density: [0.1, .nan]",
         "r.yaml:7:22: models[0].parameters.density[1]: not a finite number: .nan"),
        ("normalize: true", "normalize: 3",
         "r.yaml:10:3: parameters.normalize: must be true or false (got 3)."),
        ("normalize: true", "trim: models",
         "r.yaml:10:3: parameters.trim: must be one of tensor, model (got models)."),
        ("weight: 1.0", "semantics: paper",
         "r.yaml:6:7: models[0].parameters.semantics: semantics is one value for the whole merge, "
         "not one for each model. Move it to the recipe's `parameters:`."),
        ("ties", "tise",
         "r.yaml:1:1: merge_method: unknown merge method 'tise'. Did you mean 'ties'?"),
        ("base_model: org/base\n", "",
         "r.yaml:1:1: merge_method: ties adds changes to a base model, and the recipe names none. "
         "Add `base_model:`."),
        ("parameters:\n  normalize", "dtyp: float16\nparameters:\n  normalize",
         "r.yaml:9:1: dtyp: unknown key. Did you mean 'dtype'?"),
        ("parameters:\n  normalize", "dtype: bf16\nparameters:\n  normalize",
         "r.yaml:9:8: dtype: unknown dtype 'bf16'. Did you mean 'bfloat16'?"),
        ("parameters:\n  normalize", "tokenizer: {sorce: union}\nparameters:\n  normalize",
         "r.yaml:9:13: tokenizer.sorce: unknown key. Did you mean 'source'?"),
        ("parameters:\n  normalize", "tokenizer: {pad_to_multiple_of: 0}\nparameters:\n  normalize",
         "r.yaml:9:33: tokenizer.pad_to_multiple_of: must be at least 1 (got 0)"),
        ("parameters:\n  normalize",
         "tokenizer: {tokens: {<s>: {source: {kind: zeros}}}}\nparameters:\n  normalize",
         "r.yaml:9:43: tokenizer.tokens.<s>.source.kind: must be zero or model_token (got "
         "'zeros'). Did you mean 'zero'?"),
        ("parameters:\n  normalize", "chat_template: chatmll\nparameters:\n  normalize",
         "r.yaml:9:16: chat_template: no template of that name, and no such file: chatmll. "
         "Use auto, chatml, alpaca, llama3, mistral, exaone, or Jinja."),
        ("weight: 1.0", "weight: 1.0\n      weight: 2.0",
         "r.yaml:7:7: weight: given twice, first on line 6. Keep one of them."),
        ("weight: 1.0", "weight: {a: 1}",
         "r.yaml:6:15: models[0].parameters.weight.value: missing"),
        ("- model: org/b", "- modell: org/b",
         "r.yaml:8:5: models[1].modell: unknown key. Did you mean 'model'?"),
        ("parameters:\n  normalize", "seed: -1\nparameters:\n  normalize",
         "r.yaml:9:7: seed: must be at least 0 (got -1)"),
    ],
)  # fmt: skip
def test_mistakes(before: str, after: str, expected: str) -> None:
    assert before in TIES
    assert expected in problems(TIES.replace(before, after, 1))


def test_all_problems_at_once() -> None:
    text = TIES.replace("density: 0.5", "densty: 0.5").replace("normalize", "lamda")
    text = text.replace("merge_method", "dtyp: 1\nmerge_method")
    assert len(problems(text)) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- 1", "a recipe is a mapping"),
        ("a: [", "not valid YAML"),
        ("merge_method: ties\n\tmodels: []", "not valid YAML"),
        (
            "merge_method: soup\nmodels: [a]\n---\nmerge_method: soup\nmodels: [b]",
            "a second document without a name",
        ),
        ("merge_method: soup", "models: missing"),
        ("merge_method: soup\nmodels: []", "must be a list of at least one"),
        ("merge_method: soup\nmodels: [a]\nslices: []", "not both"),
        ("models: [a]", "merge_method: missing"),
        ("merge_method: slerp\nmodels: [a, b, c]", "slerp takes exactly 2 models (got 3)"),
        ("merge_method: dam\nbase_model: a\nmodels: [b]", "no model has `data:`"),
        ("&a {merge_method: *a}", "an alias that contains itself"),
    ],
)
def test_no_recipe_at_all(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load(text)
    assert words in str(raised.value)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe("nowhere.yaml")


def test_known_keys_without_effect_are_one_line_each() -> None:
    recipe = load(
        TIES.replace("normalize: true", "normalize: true\n  int8_mask: true\n  gamma: 0.1")
    )
    assert [w.partition(": ")[0] for w in recipe.warnings] == ["r.yaml:11:3", "r.yaml:12:3"]


def test_anchors_and_merge_keys() -> None:
    recipe = load(
        "merge_method: ties\nbase_model: org/base\nmodels:\n"
        "  - {model: org/a, parameters: &p {weight: 1.0, density: 0.5}}\n"
        "  - {model: org/b, parameters: {<<: *p, weight: 2.0}}\n"
    )
    second = recipe.models[1].parameters
    assert (second["weight"].setting, second["density"].setting) == (2.0, 0.5)


@pytest.mark.parametrize("name", ["yes", "off", "2001-01-01"])
def test_words_that_yaml_does_not_read_as_text(name: str) -> None:
    with pytest.raises(RecipeError, match="name: must be text .* put a text in quotes"):
        load(f"{TIES}name: {name}\n")
    assert load(f'{TIES}name: "{name}"\n').name == name


def test_numbers_that_yaml_reads_as_text() -> None:
    assert load(TIES.replace("1.0", "1e-3")).models[0].parameters["weight"].setting == 0.001


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/a", ModelRef("org/a")),
        ("org/a@main", ModelRef("org/a", "main")),
        ("org/a@abc+org/lora@v2", ModelRef("org/a", "abc", "org/lora", "v2")),
        ("org/a+org/lora", ModelRef("org/a", None, "org/lora")),
    ],
)
def test_references(tmp_path: Path, text: str, expected: ModelRef) -> None:
    assert parse_reference(text, tmp_path) == expected
    assert str(expected) == text


def test_a_path_on_disk_wins(tmp_path: Path) -> None:
    (tmp_path / "a@b+c").mkdir()
    assert parse_reference("a@b+c", tmp_path) == ModelRef("a@b+c")


def test_reference_as_a_mapping() -> None:
    entry = "{model: {path: org/a, revision: v1}, lora: org/l}"
    text = f"merge_method: soup\nmodels:\n  - model: {entry}\n"
    assert load(text).models[0].model == ModelRef("org/a", "v1", "org/l")


# Values


def test_settings() -> None:
    rules = (Rule("self_attn", Gradient((0.0, 1.0))), Rule("mlp", 0.25), Rule(None, 0.5))
    assert evaluate(rules, "layers.3.self_attn.q", 0.5) == 0.5
    assert evaluate(rules, "layers.3.mlp.up", 0.5) == 0.25
    assert evaluate(rules, "embed", 0.0) == 0.5
    assert evaluate(rules[:2], "embed", 0.0) is None
    assert evaluate((Rule("*", 3.0),), "anything", 0.0) == 3.0
    assert evaluate(Gradient((True, False)), "x", 0.7) is True


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0.0, 1.0, allow_subnormal=False)
)
def test_gradient_is_the_oracle(values: list[float], position: float) -> None:
    expected = oracles.gradient(values, position)
    snapped = 20 * 1e-9  # a place this near to an anchor is taken for it, between -10 and 10
    assert interpolate(tuple(values), position) == pytest.approx(expected, abs=snapped + 1e-12)


def resolved(text: str, tensor: str, position: float = 0.0) -> dict[str, Any]:
    recipe = load(text)
    method = get_method(recipe.merge_method)
    piece = recipe.slices[0] if recipe.slices else None
    specs = operand_specs(recipe, method, piece.sources if piece else recipe.models)
    return resolve(recipe, method, piece, specs, tensor, position)


def test_a_resolver_says_what_resolve_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks it once for each set of parameters, not for each tensor."""
    calls = 0
    original = resolve_module.resolve

    def counted(*given: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return original(*given)

    monkeypatch.setattr(resolve_module, "resolve", counted)
    weight = "weight: [{filter: self_attn, value: [0, 1]}, {filter: mlp, value: 0.5}, 0.25]"
    density = "density: [{filter: '*', value: 0.5}]"
    gradient = "density: [1.0, 0.1]"
    for parameters, most in ((weight, 6 * 4), (density, 1), (gradient, 6)):
        text = "merge_method: ties\nbase_model: base\nmodels:\n  - {model: a, parameters: {"
        recipe = load(text + parameters + "}}\n  - b\n")
        method = get_method("ties")
        specs = operand_specs(recipe, method, recipe.models)
        resolver = resolve_module.Resolver(recipe, method, None, specs)
        calls = 0
        for layer in range(6):
            for part in ("self_attn.q", "self_attn.k", "mlp.up", "mlp.down", "norm"):
                name, position = f"layers.{layer}.{part}", layer / 5
                expected = original(recipe, method, None, specs, name, position)
                assert resolver.of(name, position).parameters == expected
        assert calls <= most


def test_precedence() -> None:
    """Slice source over output slice over global over default."""
    text = """\
merge_method: ties
base_model: org/base
slices:
  - sources:
      - {model: org/a, layer_range: [0, 2], parameters: {weight: 0.1}}
      - {model: org/b, layer_range: [0, 2]}
    parameters:
      weight: 0.2
      density: [{filter: mlp, value: 0.3}]
parameters: {weight: 0.4, density: 0.5}
"""
    assert resolved(text, "mlp.w")["weight"] == [0.1, 0.2]
    assert resolved(text, "mlp.w")["density"] == [0.3, 0.3]
    assert resolved(text, "attn.w")["density"] == [0.5, 0.5]  # no filter fits: one level further up
    assert resolved(text, "attn.w")["lambda"] == 1.0


def test_base_among_the_sources() -> None:
    """The base has no task vector; for slerp it is the first end of the arc, wherever it stands."""
    ties = TIES.replace("  - model: org/b", "  - model: org/base\n  - model: org/b")
    assert len(resolved(ties, "w")["weight"]) == 2
    recipe = load("merge_method: slerp\nbase_model: org/base\nmodels: [org/a, org/base]\n")
    specs = operand_specs(recipe, get_method("slerp"), recipe.models)
    assert [str(s.model) for s in specs] == ["org/base", "org/a"]


def test_rescale_takes_words_and_truth() -> None:
    text = TIES.replace("ties", "dare_ties").replace("normalize: true", "rescale: {}")
    for word, value in (("l1", "l1"), ("true", True), ("false", False), ("none", "none")):
        assert resolved(text.replace("{}", word), "w")["rescale"] == value
    for word, value in (("1", True), ("0.0", False)):  # as mergekit's own output writes them
        assert resolved(text.replace("{}", word), "w")["rescale"] is value
    assert "must be one of" in problems(text.replace("{}", "0.5"))[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: soup\nmodels: [{model: }]", "models[0].model: missing"),
        ("merge_method: soup\nmodels: [{model: ''}]", "must be text"),
        ("merge_method: soup\nmodels: ['']", "must be text"),
        ("merge_method:\nmodels: [a]", "merge_method: missing"),
        ("merge_method: soup\nmodels: [{model: {path: a, model: b}}]", "path: unknown key"),
        ("merge_method: soup\nmodels: [{model: {model: a, revision: b}}]", "unknown key"),
        ("merge_method: soup\nslices: [{sources: [a]}]", "layer_range: missing"),
        ("merge_method: soup\nmodels: [a]\nname: !!timestamp x", "not a valid value"),
    ],
)
def test_traps(text: str, words: str) -> None:
    assert words in " | ".join(problems(text))


def test_names_that_are_no_paths(tmp_path: Path) -> None:
    for name in ("~nobody-of-that-name/x", "x" * 5000, "a\0b"):
        assert parse_reference(name, tmp_path).path


def test_aliases_are_read_once() -> None:
    """A mapping that merges another may itself be used again.

    Bombs: tests/system/test_untrusted_yaml.py.
    """
    text = (
        "merge_method: ties\nbase_model: o/base\nmetadata: {x: &x {weight: 1.0}}\nmodels:\n"
        "  - {model: o/a, parameters: &p {<<: *x, density: 0.5}}\n"
        "  - {model: o/b, parameters: *p}\n"
    )
    assert load(text).models[1].parameters["weight"].setting == 1.0


def test_parameters_of_the_base_have_no_effect() -> None:
    base = "  - {model: org/base, parameters: {weight: 2.0}}\n"
    recipe = load(TIES.replace("parameters:\n  normalize", f"{base}parameters:\n  normalize"))
    assert "the base has no task vector" in recipe.warnings[0]
