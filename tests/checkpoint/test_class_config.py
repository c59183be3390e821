"""What of somebody else's config.json a class is made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.adapters.pair import _build
from merge_cli.checkpoint.class_config import (
    UnknownClass,
    empty_model,
    refuse_code,
    without_choices,
)
from merge_cli.errors import SourceError
from merge_cli.evaluation.live import load
from merge_cli.lora.names import _live_names
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.tiny import llama_config, llama_tensors, write_model

CODE: list[dict[str, Any]] = [
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "org/code:function"},
    {"experts_implementation": "org/code"},
    {"attn_implementation": {"": "org/code"}},
]
ABSURD: list[dict[str, Any]] = [{"num_hidden_layers": 10**9}, {"vocab_size": 2**40}]


def model(folder: Path, keys: dict[str, Any]) -> Path:
    tensors = llama_tensors(torch.Generator().manual_seed(0))
    return write_model(folder, tensors, {**llama_config(), **keys})


@pytest.mark.parametrize("keys", CODE, ids=str)
def test_code_is_neither_asked_for_nor_looked_for(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was looked for")

    hub = "transformers.integrations.hub_kernels"
    monkeypatch.setattr(f"{hub}.load_and_register_attn_kernel", never, raising=False)
    source = open_source(ModelRef(str(model(tmp_path / "m", keys))), tmp_path)
    assert "model.norm.weight" in dict(empty_model(source.config).named_parameters())
    assert _live_names(source.tensors, source.root)
    assert _build(source) is not None
    with pytest.raises(SourceError, match="code from the Hub"):
        load(source, device="cpu", dtype="float32")


@pytest.mark.parametrize("keys", ABSURD, ids=str)
def test_no_model_of_absurd_size_is_made(keys: dict[str, Any], tmp_path: Path) -> None:
    config = {**llama_config(), **keys}
    with pytest.raises(UnknownClass, match=next(iter(keys))):
        empty_model(config)
    with pytest.raises(SourceError, match=next(iter(keys))):
        refuse_code(config, "m")
    source = open_source(ModelRef(str(model(tmp_path / "m", keys))), tmp_path)
    assert not _live_names(source.tensors, source.root)
    with pytest.raises(SourceError, match=next(iter(keys))):
        _build(source)


def test_code_in_a_part_of_a_config() -> None:
    with pytest.raises(SourceError, match="org/code@v1"):
        refuse_code({"text_config": {"attn_implementation": "org/code@v1"}}, "m")


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_what_transformers_has_itself_is_no_code(name: str) -> None:
    refuse_code({**llama_config(), "attn_implementation": name}, "m")


def test_numbers_that_json_does_not_have() -> None:
    text = json.dumps({"a": [0.0, {"__float__": "Infinity"}], "b": {"__float__": "else"}})
    found = without_choices(json.loads(text))
    assert found == {"a": [0.0, float("inf")], "b": {"__float__": "else"}}
