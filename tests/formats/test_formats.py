"""A storage format is one file and one line: a made-up one, read like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, read_numbers, reading
from merge_cli.formats import detect
from merge_cli.formats.storage_format import QUANTIZATION, DecodedModel
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.source import open_source


@dataclass(frozen=True)
class Quarters(Float32):
    """int8 codes, each a quarter of a unit."""

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

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        out = np.frombuffer(buffer, np.float32)
        raw = np.empty(len(out), np.int8)
        read(self.codes, start, raw.view(np.uint8).data)
        out[:] = raw / np.float32(4)


class QuarterFormat:
    name = "quarters"
    codes = "I8"
    block = (1, 1)

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return bool(config.get(QUANTIZATION, {}).get("quant_method") == self.name)

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        plain = {key: value for key, value in config.items() if key != QUANTIZATION}
        numbers: dict[str, Tensor] = {name: Quarters(ref) for name, ref in tensors.items()}
        return DecodedModel(numbers, plain, (f"{label} is read in quarters",))

    def encode(self, rows: Any, columns: int) -> tuple[Any, Any]:
        raise NotImplementedError

    def settings(self, unconverted: Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"w": torch.tensor([[1, -2, 3]], dtype=torch.int8)}, tmp_path / "model.safetensors")
    config = '{"hidden_size": 3, "quantization_config": {"quant_method": "quarters"}}'
    (tmp_path / "config.json").write_text(config)
    return tmp_path


def test_a_listed_format_is_read_as_numbers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "FORMATS", (*detect.FORMATS, QuarterFormat()))
    source = open_source(ModelRef(str(model)), model)
    with reading() as read:
        numbers = read_numbers(read, source.tensors["w"], 1, 2)
    assert numbers.tolist() == [-0.5, 0.75]
    assert source.config == {"hidden_size": 3}
    assert source.notes[-1].endswith("is read in quarters")


def test_one_that_is_not_listed_is_named(model: Path) -> None:
    source = open_source(ModelRef(str(model)), model)
    assert detect.advice(source.config) == ("quarters", detect._ALWAYS)
