"""The data-flow space: which layers are stacked, as a static recipe of slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge_cli.errors import RecipeError, UsageError
from merge_cli.evaluation.live import load
from merge_cli.evolve.layer_space import LayerSpace
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.evolve.plan import plan_search
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.evolve_tiny import (
    OPTIONS,
    journal,
    merge,
    run_search,
    write_family,
    write_search,
)

LAYERS: dict[str, Any] = {
    "method": "passthrough",
    "parameters": None,
    "layers": {"repeat": 2, "min": 2, "max": 6},
    "evaluations": 8,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), layers=4)


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def space_of(folder: Path, **layers: Any) -> LayerSpace:
    recipe = write_search(folder, {**LAYERS, "layers": layers})
    space = plan_search(make_plan(load_recipe(recipe)), OPTIONS).space
    assert isinstance(space, LayerSpace)
    return space


def stack(space: LayerSpace, genome: list[float]) -> list[tuple[str, int]]:
    """The layers of a recipe, one by one."""
    return [
        (Path(source.model.path).name, layer)
        for one in space.recipe(genome).slices
        for source in one.sources
        for layer in range(*(source.layer_range or ()))
    ]


def test_indicators_are_of_the_sequence(folder: Path) -> None:
    """Written naively: all models' layers, `repeat` times, those that have a 1."""
    space = space_of(folder, repeat=2, min=1, max=16)
    sequence = [(name, layer) for _ in range(2) for name in ("a", "b") for layer in range(4)]
    assert len(space) == 16
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        genome = torch.rand(16, generator=generator).tolist()
        wanted = [item for item, u in zip(sequence, genome, strict=True) if u >= 0.5]
        assert stack(space, genome) == wanted
        assert space.values(genome) == [int(u >= 0.5) for u in genome]
    slices = space.recipe([0.9] * 8 + [0.1] * 8).slices
    assert [s.sources[0].layer_range for s in slices] == [(0, 4), (0, 4)]  # neighbours are one


def test_results_have_the_layers_that_were_asked_for(folder: Path) -> None:
    space = space_of(folder, repeat=2, block=3, min=3, max=5)  # blocks of 3 and of 1
    generator = torch.Generator().manual_seed(1)
    for scale in (0.2, 1.0, 5.0):
        for _ in range(20):
            genome = (torch.rand(len(space), generator=generator) * scale).clamp(0, 1).tolist()
            assert 3 <= len(stack(space, genome)) <= 5
    # What changes is what is nearest to changing.
    space = space_of(folder, min=1, max=1)
    assert stack(space, [0.6, 0.7, 0.9, 0.8, 0.1, 0.2, 0.3, 0.4]) == [("a", 2)]
    assert stack(space, [0.1, 0.2, 0.3, 0.4, 0.49, 0.2, 0.3, 0.4]) == [("b", 0)]


def test_each_model_is_in_the_space(folder: Path) -> None:
    recipe = write_search(folder, LAYERS)
    decided = plan_search(make_plan(load_recipe(recipe)), OPTIONS)
    assert isinstance(decided.space, LayerSpace)
    in_space = [merge for merge in decided.statics if merge.genome]
    assert [merge.name for merge in in_space] == ["a", "b"]
    for parent in in_space:
        assert stack(decided.space, parent.genome) == [(parent.name, i) for i in range(4)]


def test_a_candidate_has_the_weights_that_the_engine_writes(folder: Path) -> None:
    space = space_of(folder, repeat=2, min=1, max=16)
    decided = plan_search(make_plan(load_recipe(folder / "recipe.yaml")), OPTIONS)
    whole = MergeableModel(decided.static(), OPTIONS, device="cpu")
    for bits in ("0100110000000000", "1111111111110000", "1000000000000001"):
        recipe = space.recipe([float(bit) for bit in bits])
        live = MergeableModel(recipe, OPTIONS, shared=whole, device="cpu")
        live.become(recipe)
        path = folder / f"{bits}.yaml"
        slices = [
            {"sources": [{"model": str(s.sources[0].model),
                          "layer_range": list(s.sources[0].layer_range or ())}]}
            for s in recipe.slices
        ]  # fmt: skip
        document = {"merge_method": "passthrough", "base_model": "base", "slices": slices,
                    "dtype": "bfloat16"}  # fmt: skip
        path.write_text(yaml.safe_dump(document))
        out = merge(path, folder / bits).path
        disk = dict(
            load(open_source(ModelRef(str(out)), folder), device="cpu").net.named_parameters()
        )
        ours = dict(live.live.net.named_parameters())
        assert ours.keys() == disk.keys()
        assert all(torch.equal(ours[name], disk[name]) for name in ours), bits
        live.close()
    whole.close()


@pytest.mark.parametrize("optimizer", ["cma-es", "tpe"])
def test_a_search_ends_in_slices_or_in_a_static_merge(folder: Path, optimizer: str) -> None:
    recipe = write_search(folder, {**LAYERS, "optimizer": optimizer})
    found = run_search(recipe, folder / "out")
    lines = journal(found.folder.journal)[1:]
    compared = {
        x["number"]: sum(v["loss"][0] for v in x["values"].values())
        for x in lines
        if x["kind"] == "validation"
    }
    assert sum(number < 0 for number in compared) == 14  # all static merges, parents among them
    assert compared[found.record["best"]["number"]] == min(compared.values())
    assert found.record["cost"]["failed"] == 0
    candidates = [x for x in lines if x["kind"] == "candidate"]
    values = [tuple(x["parameters"].values()) for x in candidates]
    assert len(set(values)) == len(values), "one stack is not evaluated twice"
    assert len(found.record["history"]) == 8
    again = run_search(recipe, folder / "again")
    assert again.text == found.text


def test_the_result_merges_to_the_same_bytes_without_a_search(folder: Path) -> None:
    """Judged by depth, so that it is no static merge: the deepest that is allowed."""
    (folder / "own.py").write_text("def depth(net, tokenizer):\n    return len(net.model.layers)\n")
    recipe = write_search(folder, LAYERS, objective=[{"python": "own.py:depth", "goal": "max"}])
    result = merge(recipe, folder / "out")
    assert result.report["search"]["best"]["static"] == ""
    assert result.report["search"]["verdict"]["better"]
    config = json.loads((folder / "out" / "config.json").read_text())
    assert 4 < config["num_hidden_layers"] <= 6
    text = yaml.safe_load((folder / "out" / "best_recipe.yaml").read_text())
    assert text["merge_method"] == "passthrough"
    assert "search" not in text
    counts = [s["sources"][0]["layer_range"] for s in text["slices"]]
    assert sum(end - start for start, end in counts) == config["num_hidden_layers"]
    weights = (folder / "out" / "model.safetensors").read_bytes()
    for name in ("best_recipe.yaml", "merge_recipe.yaml"):
        again = merge(folder / "out" / name, folder / f"again {name}")
        assert (again.path / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "soup"}, "layers are stacked as they are"),
        ({"parameters": {"scale": {"min": 0, "max": 1}}}, "searches no parameters"),
        ({"layer_groups": 2}, "search.layer_groups.*has no meaning beside `layers`"),
        ({"start": "softmax"}, "layers have none"),
        ({"layers": {"min": 5, "max": 3}}, "must be at least min"),
        ({"layers": {"repeat": 0}}, "at least 1"),
        ({"layers": {"min": 9}}, "9 layers, and the sequence has 8"),
        ({"layers": {"block": 5}}, "5 layers of 4"),
        ({"layers": {"block": 3, "min": 4, "max": 5}}, r"must be above min \(4\) by 2"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: Any, message: str) -> None:
    recipe = write_search(folder, {**LAYERS, **changes})
    with pytest.raises(RecipeError, match=message):
        plan_search(make_plan(load_recipe(recipe)), OPTIONS)


def test_a_recipe_is_no_start(folder: Path) -> None:
    (folder / "other.yaml").write_text("merge_method: soup\nmodels: [a, b]\n")
    recipe = write_search(folder, {**LAYERS, "start": "other.yaml"})
    with pytest.raises(UsageError, match="does not start from a recipe"):
        plan_search(make_plan(load_recipe(recipe)), OPTIONS)
