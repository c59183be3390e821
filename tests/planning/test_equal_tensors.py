"""Integers that are copied from one source: every other source has the same, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import MismatchError, SourceError
from tests.support import dam_tiny, evolve_tiny
from tests.support.tiny import llama_config, llama_tensors, merge, write_model

NAME = "model.layers.0.self_attn.extra"
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {name: tensor.bfloat16() for name, tensor in llama_tensors(GENERATOR).items()}
NARROW = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)


def merged(root: Path, *extra: torch.Tensor, method: str = "linear", **keys: Any) -> torch.Tensor:
    """The tensor that a merge makes of one in each model."""
    for number, tensor in enumerate(extra):
        write_model(root / f"m{number}", {**WEIGHTS, NAME: tensor}, llama_config())
    models = ", ".join(f"./m{number}" for number in range(len(extra)))
    lines = [f"merge_method: {method}", f"models: [{models}]"]
    lines += [f"{key}: {value}" for key, value in keys.items()]
    (root / "recipe.yaml").write_text("\n".join(lines))
    return merge(root / "recipe.yaml", root / "out")[NAME]


def integers(dtype: torch.dtype, *changed: int) -> torch.Tensor:
    values = torch.arange(2 * 600_000, dtype=torch.int64) % 100
    for element in changed:
        values[element] += 1
    return values.to(dtype).reshape(2, -1)


@pytest.mark.parametrize("dtype", NARROW)
def test_equal_integers_are_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = integers(dtype)
    found = merged(tmp_path, wanted, integers(dtype), integers(dtype))
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.int64), wanted.to(torch.int64))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("element", [0, 7, 1_199_999])
def test_integers_that_differ_are_refused(tmp_path: Path, dtype: torch.dtype, element: int) -> None:
    with pytest.raises(SourceError) as caught:
        merged(tmp_path, integers(dtype), integers(dtype), integers(dtype, element))
    assert f"holds other integers than ./m0 (first at element {element})" in str(caught.value)
    assert "./m2" in str(caught.value)
    assert NAME in str(caught.value)
    assert "quantization_config" in str(caught.value)
    assert not [*tmp_path.glob("out*")]


def test_the_base_counts_too(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds other integers"):
        merged(
            tmp_path, integers(torch.int32), integers(torch.int32, 3),
            method="task_arithmetic", base_model="./m0",
        )  # fmt: skip


@pytest.mark.parametrize("other", [torch.uint8, torch.int64, torch.float32, torch.complex64])
@pytest.mark.parametrize("turned", [False, True])
def test_another_dtype_is_refused_in_the_plan(
    tmp_path: Path, other: torch.dtype, turned: bool
) -> None:
    pair = integers(torch.int32), integers(torch.int32).to(other)
    with pytest.raises(MismatchError, match=f"{NAME}.*not stored as numbers of one kind"):
        merged(tmp_path, *(pair[::-1] if turned else pair))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.complex64])
def test_a_weight_that_one_model_stores_otherwise_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Neither dropped nor taken for the result; the plan says so."""
    weight = "model.layers.0.self_attn.q_proj.weight"
    for name, tensor in (("a", WEIGHTS[weight]), ("b", WEIGHTS[weight].to(dtype))):
        write_model(tmp_path / name, {**WEIGHTS, weight: tensor}, llama_config())
    for models in ("[./a, ./b]", "[./b, ./a]"):
        (tmp_path / "r.yaml").write_text(f"merge_method: linear\nmodels: {models}")
        with pytest.raises(MismatchError) as caught:
            merge_cli.plan(tmp_path / "r.yaml")
        assert weight in str(caught.value)
        assert "./a BF16" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_matrix_of_anything_but_floats_is_the_same_in_all(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """A row of counters or flags may differ; a matrix could be a weight."""
    same, other = torch.tensor([[1, 2], [0, 1]]).to(dtype), torch.tensor([[1, 2], [1, 0]]).to(dtype)
    assert torch.equal(merged(tmp_path / "same", same, same), same)
    kind = "complex numbers" if dtype.is_complex else "integers"
    with pytest.raises(SourceError, match=f"holds other {kind}"):
        merged(tmp_path / "other", same, other)


def test_a_buffer_is_copied_whatever_it_is_stored_as(tmp_path: Path) -> None:
    name = "model.embeddings.position_ids"
    for model, dtype in (("a", torch.int64), ("b", torch.float32), ("c", torch.int32)):
        write_model(tmp_path / model, {**WEIGHTS, name: torch.arange(9).to(dtype)}, llama_config())
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [./a, ./b, ./c]")
    assert merge(tmp_path / "r.yaml", tmp_path / "out")[name].tolist() == [*range(9)]


@pytest.mark.parametrize(
    "pair",
    [
        (torch.tensor([[1, 2]]), torch.tensor([[1, 3]])),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor(3, dtype=torch.int32), torch.tensor(4.5)),
        (torch.tensor(3, dtype=torch.int32), torch.tensor(4, dtype=torch.int32)),
        (torch.tensor([3], dtype=torch.uint8), torch.tensor([4], dtype=torch.uint8)),
    ],
)
def test_counters_and_flags_may_differ(
    tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert torch.equal(merged(tmp_path, *pair), pair[0])


def add_integers(folder: Path, *names: str) -> None:
    """To each model a tensor of integers of its own."""
    for number, name in enumerate(names):
        file = folder / name / "model.safetensors"
        tensors = load_file(file) | {NAME: integers(torch.int32, number)}
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["dam", "fisher", "auto", "evolutionary"])
def test_nothing_is_learned_or_searched_before_they_are_compared(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    if method == "evolutionary":
        recipe = evolve_tiny.write_search(evolve_tiny.write_family(tmp_path))
    else:
        dam_tiny.write_models(tmp_path, dam_tiny.config())
        dam_tiny.write_data(tmp_path, rows=120)
        recipe = dam_tiny.write_recipe(tmp_path, {"examples": 8})
        text = recipe.read_text().replace("merge_method: dam", f"merge_method: {method}")
        if method in ("fisher", "auto"):
            text = text.partition("training:")[0]
        recipe.write_text(text)
    add_integers(tmp_path, "base", "a", "b", "c")
    seen: list[str] = []
    with pytest.raises(SourceError, match="holds other integers"):
        merge_cli.merge(
            recipe, tmp_path / "out", options=evolve_tiny.OPTIONS,
            on_progress=lambda progress: seen.append(progress.stage),
        )  # fmt: skip
    assert not seen
    assert not [*tmp_path.glob("out*")]
