"""Integers that are copied from one source: every other source has the same, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import SourceError
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


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is stored as U8, and as I32 in ./m0"):
        merged(tmp_path, integers(torch.int32), integers(torch.uint8))


@pytest.mark.parametrize(
    "pair",
    [
        (torch.tensor([[1, 2]]), torch.tensor([[1, 3]])),
        (torch.tensor([[True, False]]), torch.tensor([[True, True]])),
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
