"""Dicts of tensors are merged as the engine merges files, bit for bit, and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.engine import dict_merger
from merge_cli.errors import MismatchError, NonFiniteError, RecipeError, UsageError
from merge_cli.methods.registry import all_methods, get_method
from merge_cli.options import MergeOptions
from tests.support.tiny import Tensors, llama_config, llama_tensors, read_model, write_model

NAMES = ("base", "a", "b", "c")
PARAMETERS: dict[str, dict[str, Any]] = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.001}}
PLAIN = [method.name for method in all_methods() if method.plain]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensors]]:
    """Four models on disk, the base first, and their tensors."""
    folder = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(3)
    written = []
    for name in NAMES:
        tensors = {key: t.bfloat16() for key, t in llama_tensors(generator, layers=2).items()}
        write_model(folder / name, tensors, llama_config(layers=2))
        written.append(tensors)
    return folder, written


def merged_on_disk(folder: Path, document: dict[str, Any]) -> Tensors:
    recipe = merge_cli.load_recipe(folder / "recipe.yaml", text=yaml.safe_dump(document))
    options = MergeOptions(overwrite=True, threads=1, statistics=False)
    merge_cli.merge(recipe, folder / "out", options=options)
    return read_model(folder / "out")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


@pytest.mark.parametrize("name", [*PLAIN, "ties: paper"])
def test_the_numbers_are_the_engines(name: str, family: tuple[Path, list[Tensors]]) -> None:
    folder, (base, *others) = family
    name, _, semantics = name.partition(": ")
    method = get_method(name)
    count = 1 if method.base_is_source else min(3, method.count[1] or 3)
    parameters = dict(PARAMETERS.get(name, {}))
    if "density" in method.parameters:
        parameters["density"] = 0.5
    if semantics:
        parameters["semantics"] = semantics
    document: dict[str, Any] = {"merge_method": name, "models": [*NAMES[1 : count + 1]]}
    with_base = method.needs_base or method.base_is_source
    if with_base:
        document["base_model"] = "base"
    if parameters:
        document["parameters"] = parameters
    expected = merged_on_disk(folder, {**document, "seed": 7})
    result = merge_cli.merge_state_dicts(
        others[:count], None, name, base if with_base else None, seed=7, **parameters
    )
    assert same(result, expected)


def test_one_value_for_each_dict(family: tuple[Path, list[Tensors]]) -> None:
    folder, (base, *others) = family
    weights, densities = [0.1, 0.7, 0.4], [0.2, 0.5, 0.9]
    models = [
        {"model": name, "parameters": {"weight": w, "density": d}}
        for name, w, d in zip(NAMES[1:], weights, densities, strict=True)
    ]
    document = {"merge_method": "ties", "base_model": "base", "models": models}
    expected = merged_on_disk(folder, {**document, "parameters": {"lambda": 0.8}})
    result = merge_cli.merge_state_dicts(
        others, weights, "ties", base, density=densities, lambda_=0.8
    )
    assert same(result, expected)


def test_blocks_do_not_matter(
    family: tuple[Path, list[Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    base, *others = [{"w": torch.randn(300, 1000, generator=generator)} for _ in range(4)]
    results = []
    for block in (65_536, 4 * 65_536, 64 * 65_536):
        monkeypatch.setattr(dict_merger, "_CPU_BLOCK", block)
        results.append(
            merge_cli.merge_state_dicts(others, None, "ties", base, density=0.3, semantics="paper")
        )
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_dtypes() -> None:
    half, wide = torch.full((4,), 0.1).half(), torch.full((4,), 0.3, dtype=torch.float64)
    brain = torch.full((4,), 0.5).bfloat16()
    merge = merge_cli.merge_state_dicts
    assert merge([{"w": half}, {"w": half}])["w"].dtype == torch.float16
    assert merge([{"w": half}, {"w": brain}])["w"].dtype == torch.float32
    assert merge([{"w": half}, {"w": wide}])["w"].dtype == torch.float64
    result = merge([{"w": half}, {"w": wide}], dtype=torch.bfloat16)["w"]
    assert result.dtype == torch.bfloat16
    exact = (half.double() + wide) / 2
    assert torch.equal(merge([{"w": half}, {"w": wide}])["w"], exact)


def test_what_is_not_a_float_is_copied() -> None:
    first = {"w": torch.ones(2), "steps": torch.tensor([1, 2]), "mask": torch.tensor([True])}
    second = {"w": torch.zeros(2), "steps": torch.tensor([3, 4]), "mask": torch.tensor([False])}
    result = merge_cli.merge_state_dicts([first, second], dtype=torch.float16)
    assert result["w"].tolist() == [0.5, 0.5]
    assert result["steps"].tolist() == [1, 2]
    assert result["mask"].tolist() == [True]
    result["steps"][0] = 9
    assert first["steps"].tolist() == [1, 2]


def test_tied_weights_stay_tied_and_scalars_and_empty_tensors_are_merged() -> None:
    def model(value: float) -> Tensors:
        shared = torch.full((3, 2), value)
        return {"e": shared, "h": shared, "s": torch.tensor(value), "n": torch.empty(0, 3)}

    result = merge_cli.merge_state_dicts([model(1.0), model(3.0)], [1, 3])
    assert result["h"] is result["e"]
    assert result["e"].tolist() == [[2.5, 2.5]] * 3
    assert result["s"].item() == 2.5
    assert result["n"].shape == (0, 3)
    assert list(result) == ["e", "h", "s", "n"]


def test_parameters_of_a_module_and_strides() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    result = merge_cli.merge_state_dicts([{"w": weight}, {"w": torch.zeros(3, 2)}])
    assert not result["w"].requires_grad
    assert torch.equal(result["w"], weight.detach() / 2)
    assert weight.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"w": torch.ones(3)}, "has the shape (3,), and (2,)"),
        ({"v": torch.ones(2)}, "lacks w"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, "is not in state_dicts[0]: v"),
        ({"w": [1.0, 2.0]}, "is not a tensor but list"),
        ({"w": torch.ones(2, device="meta")}, "meta device"),
        ({"w": torch.ones(2).to_sparse()}, "sparse"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "float8_e4m3fn, which is not merged"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64, which is not merged"),
    ],
)
def test_dicts_that_do_not_fit(second: Any, message: str) -> None:
    with pytest.raises(MismatchError) as caught:
        merge_cli.merge_state_dicts([{"w": torch.ones(2)}, second])
    assert message in str(caught.value)
    assert "state_dicts[1]" in str(caught.value)


ONE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"state_dicts": []}, UsageError, "no state dicts"),
        ({"method": "soop"}, UsageError, "unknown merge method 'soop'"),
        ({"method": "dam"}, UsageError, "dam needs more"),
        ({"method": "checkpoint_average"}, UsageError, "needs more"),
        ({"method": "ties"}, UsageError, "Give base"),
        ({"base": ONE}, UsageError, "soup has no use for a base"),
        ({"weights": [1]}, UsageError, "weight has 1 values for 2 state dicts"),
        ({"weights": [1, 2], "weight": 1}, UsageError, "either weights or weight"),
        ({"weights": [1, -1]}, UsageError, "sum to 0"),
        (
            {"densty": 0.5, "method": "ties", "base": ONE},
            UsageError,
            "no parameter 'densty'.*density",
        ),
        ({"density": 0.5}, UsageError, "soup has no parameter 'density'"),
        ({"normalize": [True, False]}, UsageError, "one value for the whole merge"),
        ({"density": -1, "method": "ties", "base": ONE}, RecipeError, "density"),
        ({"method": "slerp", "state_dicts": [ONE] * 3, "t": 0.5}, RecipeError, "slerp takes"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_cli.merge_state_dicts(**{"state_dicts": [ONE, ONE], **arguments})


def test_numbers_that_are_none() -> None:
    bad = {"w": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NonFiniteError, match="w"):
        merge_cli.merge_state_dicts([ONE, bad])
    allowed = merge_cli.merge_state_dicts([ONE, bad], allow_non_finite=True)["w"]
    assert allowed[0] == 1
    assert allowed[1].isnan()
    large = {"w": torch.full((2,), 60000.0).half()}
    with pytest.raises(NonFiniteError, match="too large for float16"):
        merge_cli.merge_state_dicts([large, large], normalize=False)
