"""A storage format is one file and one line: a made-up one, read and written like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, read_numbers, reading
from merge_cli.documents import merge_plan
from merge_cli.formats import detect, registry
from merge_cli.formats.encoding import Encoding, Part, Tiles, changed_groups
from merge_cli.formats.storage_format import QUANTIZATION, DecodedModel, WritableFormat
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe import schema
from merge_cli.recipe.fields import CODES, SAME
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.encoded import recipe
from tests.support.tiny import merge, read_model, write_model


@dataclass(frozen=True)
class QuarterEncoding(Encoding):
    """int8 codes, each a quarter of a unit."""

    family = "quarters"
    label = "I8"
    described = "no scale: every number is a quarter"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("", "I8", shape, 1, 1),)

    def tile(self, shape: tuple[int, ...]) -> int:
        return 1

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        changed = changed_groups(tiles.values[:, None], tiles.before)
        codes = np.rint(np.clip(tiles.values * 4, -128, 127)).astype(np.int8)
        stored[0][changed] = codes.view(np.uint8)[changed]

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        return {"quant_method": "quarters", "ignore": list(unconverted)}


@dataclass(frozen=True)
class Quarters(Float32):
    """A weight that is stored so."""

    codes: TensorRef
    default_dtype: str = "BF16"

    @property
    def made_of(self) -> Tensor:
        return self.codes

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes,)

    @property
    def formula(self) -> str:
        return "quarters"

    @property
    def encoding(self) -> Encoding | str:
        return QuarterEncoding()

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        out = np.frombuffer(buffer, np.float32)
        raw = np.empty(len(out), np.int8)
        read(self.codes, start, raw.view(np.uint8).data)
        out[:] = raw / np.float32(4)


class QuarterFormat:
    name = "quarters"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return bool(config.get(QUANTIZATION, {}).get("quant_method") == self.name)

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        plain = {key: value for key, value in config.items() if key != QUANTIZATION}
        numbers: dict[str, Tensor] = {
            name: Quarters(ref) if ref.dtype == "I8" else ref for name, ref in tensors.items()
        }
        return DecodedModel(numbers, plain, (f"{label} is read in quarters",))

    def encoding(self, word: str, dtype: str, config: Mapping[str, Any]) -> Encoding | None:
        return QuarterEncoding() if word == self.name else None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"w": torch.tensor([[1, -2, 3]], dtype=torch.int8)}, tmp_path / "model.safetensors")
    config = '{"hidden_size": 3, "quantization_config": {"quant_method": "quarters"}}'
    (tmp_path / "config.json").write_text(config)
    return tmp_path


def test_a_listed_format_is_read_as_numbers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, QuarterFormat()))
    source = open_source(ModelRef(str(model)), model)
    with reading() as read:
        numbers = read_numbers(read, source.tensors["w"], 1, 2)
    assert numbers.tolist() == [-0.5, 0.75]
    assert source.config == {"hidden_size": 3}
    assert source.notes[-1].endswith("is read in quarters")


LAYER = "model.layers.0.mlp.up_proj.weight"


def test_a_listed_format_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `same` with the line in FORMATS alone, and by a word of its own."""
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, QuarterFormat()))
    codes = torch.randint(-90, 90, (6, 8), dtype=torch.int8)
    norm = torch.ones(8, dtype=torch.bfloat16)
    words = {"hidden_size": 8, QUANTIZATION: {"quant_method": "quarters"}}
    write_model(tmp_path / "q", {LAYER: codes, "model.norm.weight": norm}, words)
    other = {LAYER: codes.bfloat16() / 4 + 3, "model.norm.weight": norm}
    write_model(tmp_path / "plain", other, {"hidden_size": 8})
    keys = {"base_model": "q", "parameters": {"weight": 0.5}}
    path = recipe(tmp_path, SAME, "task_arithmetic", "plain", **keys)
    found = merge(path, tmp_path / "out", threads=1)
    assert torch.equal(found[LAYER], codes + 6)
    assert torch.equal(found["model.norm.weight"], norm)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **words,
        "dtype": "bfloat16",
    }
    copy = merge(recipe(tmp_path, SAME, "passthrough", "q"), tmp_path / "copy", threads=1)
    assert torch.equal(copy[LAYER], codes)

    # A word of its own is one more line, in recipe/fields.py.
    monkeypatch.setattr(schema, "CODES", (*CODES, "quarters"))
    asked = load_recipe(recipe(tmp_path, None, "passthrough", "plain"))
    plan = make_plan(replace(asked, out_dtype="quarters"))
    merge_plan(plan, tmp_path / "w", MergeOptions(device="cpu", threads=1), lambda _: None)
    word = read_model(tmp_path / "w")
    assert torch.equal(word[LAYER], codes + 12)
    about = json.loads((tmp_path / "w" / "config.json").read_text())[QUANTIZATION]
    assert about == {"quant_method": "quarters", "ignore": ["lm_head"]}


def test_every_word_of_recipes_is_one_formats() -> None:
    writable = [f for f in registry.FORMATS if isinstance(f, WritableFormat)]
    for word in CODES:
        offered = [f.name for f in writable if f.encoding(word, "BF16", {}) is not None]
        assert len(offered) == (word != SAME), word


def test_one_that_is_not_listed_is_named(model: Path) -> None:
    source = open_source(ModelRef(str(model)), model)
    assert detect.advice(source.config) == ("quarters", detect._ALWAYS)
