"""`out_dtype:` of codes and `same`: sizes, twins, blocks that stay, and the same bytes always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merge_cli
from merge_cli.engine import memory
from merge_cli.errors import Interrupted, NonFiniteError
from merge_cli.kernels import compiled
from merge_cli.options import MergeOptions
from merge_cli.planning import chunks as units
from tests.support.encoded import (
    BITS,
    WORDS,
    about,
    family,
    numbers_of,
    quantised_names,
    read_model,
    recipe,
    same_files,
    written,
)
from tests.support.tiny import llama_config, merge, write_model

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("word", WORDS)
def test_size_on_disk_and_what_stays(tmp_path: Path, word: str) -> None:
    first, second = family(tmp_path)
    out = written(tmp_path, "out", word)
    stored, coded = read_model(out), quantised_names(first)
    for name in set(first) - set(coded):
        mean = (first[name].float() + second[name].float()) / 2
        assert torch.equal(stored[name], mean.bfloat16())
    parts = {key: value for key, value in stored.items() if "_proj" in key}
    numbers = sum(first[name].numel() for name in coded)
    rows = sum(len(first[name]) for name in coded)
    constants = sum(v.nbytes for k, v in parts.items() if k.endswith(("_shape", "global_scale")))
    constants += sum(v.nbytes for v in parts.values() if v.shape == (1,) and word == "fp8_tensor")
    assert sum(value.nbytes for value in parts.values()) - constants == (
        numbers + 2 * rows if word == "fp8_row" else numbers * BITS[word] / 8
    )


@pytest.mark.parametrize("word", WORDS)
def test_a_merge_is_that_of_the_dequantised_twin(tmp_path: Path, word: str) -> None:
    """A quantised model and its twin in float32 give one merge, within the output's rounding."""
    family(tmp_path)
    quantised = written(tmp_path, "q", word, "a", method="passthrough")
    twin = numbers_of(quantised)
    write_model(tmp_path / "twin", twin, llama_config(layers=2, width=128))
    keys: dict[str, Any] = {"dtype": "bfloat16"}
    plain = numbers_of(written(tmp_path, "plain", "float32", "twin", "b"))
    from_codes = numbers_of(written(tmp_path, "codes", word, "q", "b", **keys))
    from_twin = numbers_of(written(tmp_path, "twins", word, "twin", "b", **keys))
    for name in quantised_names(twin):
        exact = plain[name].double()
        step = exact.abs().max() / {"f": 14, "i": 7.5, "n": 4, "m": 4}[word[0]]
        for found in (from_codes, from_twin):
            assert (found[name].double() - exact).abs().max() <= step
        if word != "nvfp4":  # which keeps the scale of the tensor where it will do
            assert torch.equal(from_codes[name], from_twin[name])


@pytest.mark.parametrize("word", WORDS)
def test_a_passthrough_with_same_is_byte_for_byte(tmp_path: Path, word: str) -> None:
    family(tmp_path)
    first = written(tmp_path, "q", word)
    assert same_files(written(tmp_path, "again", "same", "q", method="passthrough"), first)


@pytest.mark.parametrize("word", WORDS)
def test_a_merge_of_a_model_with_itself_keeps_every_block(tmp_path: Path, word: str) -> None:
    family(tmp_path)
    first = written(tmp_path, "q", word)
    assert same_files(written(tmp_path, "again", "same", "q", "q"), first)


@pytest.mark.parametrize("word", WORDS)
def test_blocks_that_no_source_changed_stay_byte_for_byte(tmp_path: Path, word: str) -> None:
    """One row of one matrix moves: with `same`, all other blocks are as they were."""
    family(tmp_path, "a")
    base = written(tmp_path, "q", word, "a", method="passthrough")
    changed = numbers_of(base)
    changed[NAME][140] *= 0.75
    config = {**llama_config(layers=2, width=128), "dtype": "float32"}
    write_model(tmp_path / "tuned", changed, config)
    keys = {"base_model": "q", "parameters": {"weight": 1.0}}
    out = written(tmp_path, "out", "same", "tuned", method="task_arithmetic", **keys)
    before, after = read_model(base), read_model(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        old, new = (t.view(torch.uint8).flatten() for t in (value, after[name]))
        differs = (old != new).reshape(len(value) if value.ndim else 1, -1).any(1)
        if not name.startswith(NAME):
            assert not differs.any(), name
        elif differs.any():
            rows = differs.nonzero().flatten().tolist()
            assert rows == ([1] if "_scale_inv" in name else [140]) or (
                word == "fp8" and min(rows) >= 128
            ), name
    found = numbers_of(out)[NAME]
    assert not torch.equal(found[140], numbers_of(base)[NAME][140])


@pytest.mark.parametrize("word", ["fp8_tensor", "nvfp4"])
def test_a_scale_of_the_tensor_that_is_too_small_is_made_anew(tmp_path: Path, word: str) -> None:
    """Then every number is written again, as of a model that has no blocks to keep."""
    family(tmp_path, "a")
    base = written(tmp_path, "q", word, "a", method="passthrough")
    changed = numbers_of(base)
    changed[NAME][140] *= 20
    config = {**llama_config(layers=2, width=128), "dtype": "float32"}
    write_model(tmp_path / "tuned", changed, config)
    keys = {"base_model": "q", "parameters": {"weight": 1.0}, "dtype": "bfloat16"}
    out = written(tmp_path, "out", "same", "tuned", method="task_arithmetic", **keys)
    fresh = written(tmp_path, "fresh", word, "tuned", method="passthrough", dtype="bfloat16")
    assert torch.equal(numbers_of(out)[NAME], numbers_of(fresh)[NAME])


@pytest.mark.parametrize("word", [*WORDS, "same"])
def test_the_bytes_do_not_depend_on_blocks_threads_or_arithmetic(
    tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path, "a", "b", "c")
    written(tmp_path, "q", "int4", "a", method="passthrough")
    base = "q" if word == "same" else "a"
    keys = {"base_model": base, "parameters": {"density": 0.6}, "dtype": "bfloat16"}
    path = recipe(tmp_path, word, "ties", "b", "c", **keys)
    merge(path, tmp_path / "one", threads=1)
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 60)
    monkeypatch.setattr(memory, "_HOST_BLOCK", 60 * 7)  # in the middle of rows and of groups
    merge(path, tmp_path / "two", threads=3)
    assert same_files(tmp_path / "two", tmp_path / "one")
    monkeypatch.setattr(memory, "_HOST_BLOCK", 60 * 700)
    monkeypatch.setattr(compiled, "available", lambda: "switched off")
    merge(path, tmp_path / "three", threads=1)
    assert same_files(tmp_path / "three", tmp_path / "one")


@pytest.mark.parametrize("word", ["int4", "nvfp4", "mxfp4"])
def test_a_group_with_nan_is_nan(tmp_path: Path, word: str) -> None:
    """Four bits have no NaN: the scale is, so that the whole group reads as NaN."""
    first, _ = family(tmp_path)
    first[NAME][3, 5] = float("nan")
    first[NAME][7, 100] = float("inf")
    write_model(tmp_path / "a", first, llama_config(layers=2, width=128))
    path = recipe(tmp_path, word, "passthrough", "a")
    with pytest.raises(NonFiniteError):
        merge(path, tmp_path / "refused", threads=1)
    options = MergeOptions(device="cpu", threads=1, allow_non_finite=True)
    out = merge_cli.merge(path, tmp_path / "out", options=options).path
    group = {"int4": 128, "nvfp4": 16, "mxfp4": 32}[word]
    broken = numbers_of(out)[NAME].isnan().reshape(-1, group)
    assert broken.all(1).sum() == 2
    assert broken.any(1).sum() == 2


def test_a_matrix_of_zeros(tmp_path: Path) -> None:
    first, _ = family(tmp_path)
    first[NAME].zero_()
    write_model(tmp_path / "a", first, llama_config(layers=2, width=128))
    for word in WORDS:
        out = written(tmp_path, word, word, "a", method="passthrough")
        assert not numbers_of(out)[NAME].any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scales_have_the_dtype_of_the_rest(tmp_path: Path, dtype: str) -> None:
    family(tmp_path)
    kind = getattr(torch, dtype)
    for word in ("int4", "fp8_row"):
        stored = read_model(written(tmp_path, word + dtype, word, dtype=dtype))
        assert stored[f"{NAME}_scale"].dtype == kind
        assert stored["model.norm.weight"].dtype == kind


def test_same_keeps_plain_tensors_too(tmp_path: Path) -> None:
    """Without codes anywhere, each tensor has the dtype of the reference."""
    family(tmp_path, "a")
    family(tmp_path, "b", dtype=torch.float32)
    stored = read_model(written(tmp_path, "out", "same"))
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert not about(tmp_path / "out")


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays, and scales of whole tensors come out as before."""
    from merge_cli.engine import executor

    family(tmp_path)
    path = recipe(tmp_path, "nvfp4")
    whole = written(tmp_path, "whole", "nvfp4")
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    monkeypatch.setattr(units, "BLOCK_MULTIPLE", 1024)
    finished = executor.MergeExecutor._merge_chunk
    calls = 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt
        finished(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(executor.MergeExecutor, "_merge_chunk", interrupted)
        with pytest.raises(Interrupted):
            merge(path, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    merge(path, tmp_path / "out", threads=1)
    assert same_files(tmp_path / "out", whole)


def test_bounded_memory_is_forecast(tmp_path: Path) -> None:
    """A worker's memory counts a tile as numbers and the bytes of a span."""
    from merge_cli.planning.planner import load_recipe, make_plan

    family(tmp_path)
    plan = make_plan(load_recipe(recipe(tmp_path, "fp8")))
    assert memory._encoding_bytes(plan) >= 5 * 128 * 256
    assert memory._encoding_bytes(make_plan(load_recipe(recipe(tmp_path, None)))) == 0


def test_all_numbers_of_four_bits_come_back(tmp_path: Path) -> None:
    """A matrix that MXFP4 holds exactly is written without a loss."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    generator = np.random.default_rng(0)
    matrix = generator.choice([*numbers, *-numbers], (256, 128)).astype(np.float32)
    matrix *= 2.0 ** generator.integers(-9, 3, (256, 4)).repeat(32, 1)
    first, _ = family(tmp_path)
    first[NAME] = torch.from_numpy(matrix).bfloat16()
    write_model(tmp_path / "a", first, llama_config(layers=2, width=128))
    out = written(tmp_path, "out", "mxfp4", "a", method="passthrough")
    np.testing.assert_array_equal(numbers_of(out)[NAME].numpy(), matrix)
