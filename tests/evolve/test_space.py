"""What a genome means: ranges, groups of layers, filters, ties; and what a recipe may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.errors import RecipeError
from merge_cli.evolve.importance import importance
from merge_cli.evolve.space import Gene, Space
from merge_cli.methods.registry import get_method
from merge_cli.planning.resolve import Resolver
from merge_cli.recipe.load import parse_text
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.search import SearchedParameter
from merge_cli.recipe.values import interpolate


def recipe_of(search: dict[str, Any], **keys: Any) -> Recipe:
    document = {
        "merge_method": "evolutionary", "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}], "search": search,
        "objective": [{"task": "loss", "data": "x.jsonl"}], **keys,
    }  # fmt: skip
    recipe, problems = parse_text(
        yaml.safe_dump(document, sort_keys=False), "r.yaml", Path("/nowhere")
    )
    assert recipe is not None
    assert not problems
    return recipe


def problems_of(text: str, folder: Path) -> list[str]:
    (folder / "base").mkdir(exist_ok=True)
    from merge_cli.planning.planner import load_recipe

    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


RANGES = st.one_of(
    st.builds(SearchedParameter, st.just("weight"), st.floats(-2, 0), st.floats(0.1, 3)),
    st.builds(
        SearchedParameter, st.just("e"), st.floats(1e-6, 0.01), st.floats(0.1, 3), st.just(True)
    ),
    st.builds(
        SearchedParameter,
        st.just("k"),
        st.integers(-3, 0).map(float),
        st.integers(1, 9).map(float),
        st.just(False),
        st.just(True),
    ),
    st.builds(SearchedParameter, st.just("m"), choices=st.just(("ties", "dare", "soup"))),
)


@given(RANGES, st.floats(0, 1))
def test_a_value_survives_the_way_to_a_number_and_back(
    searched: SearchedParameter, u: float
) -> None:
    gene = Gene(searched)
    value = gene.value(u)
    assert gene.value(gene.number(value)) == value
    if searched.choices:
        assert value in searched.choices
    else:
        assert isinstance(value, (int, float))
        assert searched.low <= value <= searched.high
        assert not searched.integer or type(value) is int


@given(RANGES)
def test_the_ends_of_a_range_are_reached(searched: SearchedParameter) -> None:
    gene = Gene(searched)
    ends = searched.choices[:1] + searched.choices[-1:] or (searched.low, searched.high)
    assert (gene.value(0.0), gene.value(1.0)) == ends


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.data())
def test_every_layer_has_its_groups_value(layers: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, min(layers, 6)))
    space = Space(recipe_of({
        "method": "dare_ties", "layer_groups": groups, "filters": ["self_attn", "mlp"],
        "parameters": {"weight": {"min": 0, "max": 2}, "lambda": {"min": 0, "max": 1},
                       "elect": {"choices": ["weighted", "unweighted"], "tied": "filters"},
                       "density": {"min": 0.1, "max": 1, "tied": ["models", "layers"]}},
    }), layers)  # fmt: skip
    assert sum(space.sizes) == layers
    assert max(space.sizes) - min(space.sizes) <= 1
    drawn = st.lists(st.floats(0, 1), min_size=len(space), max_size=len(space))
    genome = data.draw(drawn)
    recipe = space.recipe(genome)
    resolver = Resolver(recipe, get_method("dare_ties"), None, recipe.models)
    values = dict(zip(space.genes, space.values(genome), strict=True))
    for layer in range(layers):
        group = next(g for g in range(groups) if layer <= space.span(g)[1])
        position = layer / max(layers - 1, 1)
        for part, name in (("self_attn", "self_attn.q"), ("mlp", "mlp.up"), (None, "norm")):
            found = resolver.of(f"model.layers.{layer}.{name}.weight", position).parameters
            for gene, value in values.items():
                key = gene.searched.name
                if gene.group not in (None, group) or gene.part not in (None, part):
                    continue
                if gene.part is None and part is not None and "filters" not in gene.searched.tied:
                    continue
                got = found[key] if gene.model is None else [found[key][gene.model]]
                wanted = pytest.approx(value, abs=1e-12) if isinstance(value, float) else value
                assert all(one == wanted for one in (got if isinstance(got, list) else [got]))


def test_anchors_are_exact_for_any_number_of_layers() -> None:
    for count in range(2, 300):
        values = tuple(f"w{i}" for i in range(count))
        assert [interpolate(values, i / (count - 1)) for i in range(count)] == list(values)


def test_genes_and_their_meaning() -> None:
    search = {
        "method": ["ties", "task_arithmetic"], "layer_groups": [1, 4],
        "parameters": {"weight": {"min": 0, "max": 1}, "density": {"min": 0.1, "max": 1,
                                                                   "tied": True}},
    }  # fmt: skip
    space = Space(recipe_of(search), 5)
    assert [space.describe(gene) for gene in space.genes] == [
        "method", "weight of a, layer 0", "weight of a, layers 1 to 4", "weight of b, layer 0",
        "weight of b, layers 1 to 4", "density",
    ]  # fmt: skip
    first, second = space.recipe([0.2] + [0.5] * 5), space.recipe([0.9, *[0.25] * 4, 0.5])
    assert (first.merge_method, second.merge_method) == ("ties", "task_arithmetic")
    assert "density" in first.parameters
    assert "density" not in second.parameters  # it has no such parameter
    assert second.models[0].parameters["weight"].setting == 0.25  # all alike: a plain number
    assert not first.searches
    with pytest.raises(RecipeError, match="5 layers, and the models 6"):
        Space(recipe_of(search), 6)


def test_smooth_is_a_gradient_over_the_groups() -> None:
    search = {"method": "soup", "layer_groups": 3, "smooth": True,
              "parameters": {"weight": {"min": 0, "max": 1}}}  # fmt: skip
    space = Space(recipe_of(search), 24)
    recipe = space.recipe([0.0, 0.5, 1.0, 0.1, 0.2, 0.3])
    assert recipe.models[0].parameters["weight"].setting.values == (0.0, 0.5, 1.0)  # type: ignore[union-attr]
    assert space.describe(space.genes[1]) == "weight of a, at layer 12"


def test_a_static_parameter_stays_and_a_searched_one_wins() -> None:
    recipe = recipe_of(
        {"method": "ties", "parameters": {"density": {"min": 0.5, "max": 1, "tied": "models"}}},
        parameters={"normalize": False},
        models=[{"model": "a", "parameters": {"weight": 0.3, "density": 0.1}}, {"model": "b"}],
    )
    found = Space(recipe, 4).recipe([0.0])
    assert found.parameters["normalize"].setting is False
    assert found.models[0].parameters["weight"].setting == 0.3
    resolver = Resolver(found, get_method("ties"), None, found.models)
    assert resolver.of("x", 0.0).parameters["density"] == [0.5, 0.5]


def test_a_start_from_a_recipe() -> None:
    space = Space(recipe_of({"method": "ties", "layer_groups": 2, "parameters": {
        "weight": {"min": 0, "max": 2}, "density": {"min": 0.1, "max": 1}}}), 4)  # fmt: skip
    text = yaml.safe_dump({
        "merge_method": "ties", "base_model": "base", "parameters": {"density": 0.4},
        "models": [{"model": "a", "parameters": {"weight": [0.5, 1.5]}}, {"model": "b"}],
    })  # fmt: skip
    start, problems = parse_text(text, "s.yaml", Path("/nowhere"))
    assert start is not None
    assert not problems
    found = dict(zip(map(space.describe, space.genes), space.values(space.start_from(start)),
                     strict=True))  # fmt: skip
    assert found["weight of a, layers 0 to 1"] == pytest.approx(0.666667)
    assert found["weight of a, layers 2 to 3"] == pytest.approx(1.33333)
    assert found["weight of b, layers 0 to 1"] == 1.0  # says nothing: the middle
    assert found["density of b, layers 2 to 3"] == 0.4


def test_every_mistake_is_named_at_its_place(tmp_path: Path) -> None:
    found = problems_of(
        """merge_method: evolutionary
base_model: base
models: [{model: base}, {model: base}]
search:
  methd: ties
  method: dare_ties
  optimiser: random
  optimizer: cmaes
  evaluations: 0
  layer_groups: none
  fidelity: [0.5, 0.2]
  parameters:
    weight: {min: 1, max: 0}
    density: {min: 0.1, mx: 1.0}
    lambda: 0.3
    elect: {choices: [weighted]}
    t: {min: 0, max: 1, log: true, tied: sources}
objective: [{task: loss, data: x.jsonl}]
""",
        tmp_path,
    )
    text = "\n".join(found)
    for residency, words in (
        ("r.yaml:5:3: search.methd", "Did you mean 'method'?"),
        ("r.yaml:7:3: search.optimiser", "Did you mean 'optimizer'?"),
        ("r.yaml:8:14: search.optimizer", "Did you mean 'cma-es'?"),
        ("r.yaml:9:16: search.evaluations", "at least 1"),
        ("r.yaml:10:17: search.layer_groups", "a number of groups"),
        ("r.yaml:11:13: search.fidelity", "ascending"),
        ("r.yaml:13:27: search.parameters.weight.max", "above min"),
        ("r.yaml:14:25: search.parameters.density.mx", "Did you mean 'max'?"),
        ("r.yaml:15:13: search.parameters.lambda", "belongs to `parameters:`"),
        ("r.yaml:16:22: search.parameters.elect.choices", "at least two"),
        ("r.yaml:17:42: search.parameters.t.tied", "models, layers, filters"),
    ):
        line = next((line for line in text.splitlines() if line.startswith(residency)), "")
        assert words in line, f"{residency}: {words!r} not in\n{text}"


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("{method: tie, parameters: {weight: {min: 0, max: 1}}}", "Did you mean 'ties'?"),
        ("{method: dam, parameters: {weight: {min: 0, max: 1}}}", "finds its parameters itself"),
        ("{method: regmean, parameters: {alpha: {min: 0, max: 1}}}", "looks at examples first"),
        ("{method: ties, parameters: {densty: {min: 0.1, max: 1}}}", "Did you mean 'density'?"),
        ("{method: ties, parameters: {density: {min: -1, max: 1}}}", "a number of at least 0"),
        ("{method: ties, parameters: {elect: {min: 0, max: 1}}}", "Give `choices`"),
        ("{method: ties, parameters: {lambda: {min: 0, max: 1, tied: models}}}", "already"),
        ("{parameters: {lambda: {min: 0, max: 1}}}", "`method` is missing"),
        ("{method: passthrough}", "`parameters` is missing"),
        ("{method: ties, optimizer: random, sigma: 0.1, parameters: {lambda: {min: 0, max: 1}}}",
         "has no effect with random"),
        ("{method: ties, keep: 0.1, parameters: {lambda: {min: 0, max: 1}}}", "without `fidelity`"),
        ("{method: ties, start: no.yaml, parameters: {lambda: {min: 0, max: 1}}}", "such file"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_be_searched_for(search: str, words: str, tmp_path: Path) -> None:
    found = problems_of(
        "merge_method: evolutionary\nbase_model: base\nmodels: [{model: base}, {model: m}]\n"
        f"search: {search}\nobjective: [{{task: loss, data: x}}]\n",
        tmp_path,
    )
    assert any(words in line and line.startswith("r.yaml:") for line in found), found


def test_sections_belong_to_methods_that_search(tmp_path: Path) -> None:
    head = "base_model: base\nmodels: [{model: base}, {model: m}]\n"
    told = problems_of(f"merge_method: ties\n{head}objective: [x]\n", tmp_path)
    assert any("objective: ties searches nothing" in line for line in told)
    both = problems_of(f"merge_method: evolutionary\n{head}", tmp_path)
    assert any("objective" in line for line in both)
    assert any("search" in line for line in both)
    greedy = problems_of(
        f"merge_method: greedy_soup\n{head}objective: [x]\nsearch: {{sigma: 0.2}}\n", tmp_path
    )
    assert any("search.sigma: has no meaning in greedy_soup" in line for line in greedy)


def test_importance_finds_what_matters() -> None:
    import random

    draw = random.Random(1)
    genomes = [[draw.random() for _ in range(3)] for _ in range(200)]
    scores = [(g[1] - 0.5) ** 2 + 0.05 * g[0] + 0.001 * draw.random() for g in genomes]
    low, high, none = importance(genomes, scores)
    assert high > 0.6 > low > none
    assert importance(genomes[:29], scores[:29]) == [0.0, 0.0, 0.0]  # ten for each number
    assert any(importance(genomes[:30], scores[:30]))
