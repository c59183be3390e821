"""A running average is the soup of all that was added, bit for bit, wherever it was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import merge_cli
from merge_cli import RunningAverage
from merge_cli.errors import CorruptFileError, MismatchError, NonFiniteError, UsageError
from tests.support.tiny import Tensors

Weights = list[float]


def dicts(count: int, kind: torch.dtype = torch.bfloat16) -> list[Tensors]:
    generator = torch.Generator().manual_seed(count)
    return [
        {
            "a": torch.randn(7, 5, generator=generator).to(kind),
            "b": torch.randn(3, generator=generator),
            "steps": torch.tensor([i]),
        }
        for i in range(count)
    ]


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


@given(weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_it_is_the_soup(weights: Weights) -> None:
    added = dicts(len(weights))
    average = RunningAverage()
    for state_dict, weight in zip(added, weights, strict=True):
        average.add(state_dict, weight)
    assert same(average.average(), merge_cli.merge_state_dicts(added, weights))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_saved_and_loaded_in_between(tmp_path: Path, kind: torch.dtype) -> None:
    added = dicts(6, kind)
    average, file = RunningAverage("cpu"), tmp_path / "average.safetensors"
    for number, state_dict in enumerate(added, start=1):
        average.add(state_dict)
        average.save(file)
        average = RunningAverage.load(file)
        expected = merge_cli.merge_state_dicts(added[:number])
        assert same(average.average(), expected)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_dict_may_change_after_it_was_added() -> None:
    weight = torch.ones(2)
    average = RunningAverage()
    average.add({"w": weight})
    weight.zero_()
    average.add({"w": weight})
    assert average.average()["w"].tolist() == [0.5, 0.5]
    average.average()["w"].zero_()
    assert average.average()["w"].tolist() == [0.5, 0.5]


def test_dtypes_widen_as_a_soups_do() -> None:
    added: list[Tensors] = [{"w": torch.ones(2).half()}, {"w": torch.ones(2).bfloat16()}]
    average = RunningAverage()
    for state_dict in added:
        average.add(state_dict)
    assert same(average.average(), merge_cli.merge_state_dicts(added))
    assert average.average(torch.bfloat16)["w"].dtype == torch.bfloat16


def test_tied_weights(tmp_path: Path) -> None:
    average = RunningAverage()
    for value in (1.0, 2.0):
        shared = torch.full((2, 2), value)
        average.add({"e": shared, "h": shared})
    average.save(tmp_path / "file")
    average = RunningAverage.load(tmp_path / "file")
    result = average.average()
    assert result["h"] is result["e"]
    assert result["e"].tolist() == [[1.5, 1.5]] * 2
    with pytest.raises(MismatchError, match="tied"):
        average.add({"e": torch.ones(2, 2), "h": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("state_dict", "weight", "error", "message"),
    [
        ({"w": torch.ones(3)}, 1, MismatchError, "shape"),
        ({"v": torch.ones(2)}, 1, MismatchError, "lacks w"),
        ({"w": torch.ones(2, dtype=torch.float64)}, 1, MismatchError, "was torch.float32"),
        ({"w": torch.ones(2, dtype=torch.int64)}, 1, MismatchError, "was torch.float32"),
        ({"w": torch.tensor([1.0, float("inf")])}, 1, NonFiniteError, "w"),
        ({"w": torch.ones(2)}, float("nan"), UsageError, "finite"),
    ],
)
def test_what_is_refused_changes_nothing(
    state_dict: Any, weight: float, error: type[Exception], message: str
) -> None:
    average = RunningAverage()
    average.add({"w": torch.ones(2)})
    with pytest.raises(error, match=message):
        average.add(state_dict, weight)
    assert average.weights == [1.0]
    assert average.average()["w"].tolist() == [1.0, 1.0]


def test_no_average() -> None:
    average = RunningAverage()
    with pytest.raises(UsageError, match="nothing has been added"):
        average.average()
    average.add({"w": torch.ones(2)}, 1)
    average.add({"w": torch.ones(2)}, -1)
    with pytest.raises(UsageError, match="sum to 0"):
        average.average()


def test_another_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptFileError, match="is not a running average"):
        RunningAverage.load(tmp_path / "model.safetensors")
