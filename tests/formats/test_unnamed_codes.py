"""Codes of quantised weights in a model whose config does not say so: never taken for numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from merge_cli.errors import SourceError
from tests.support.encoded import family, written
from tests.support.quantised import opened
from tests.support.tiny import Tensors, llama_config, write_model


def codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(4, 8, dtype=torch.int64).to(dtype)


HALVES = torch.ones(4, 2, dtype=torch.float16)
MODULE = "model.layers.0.mlp.down_proj"
# What other writers store for a weight: the codes and what stands beside them.
STORED: dict[str, Tensors] = {
    "gptq": {f"{MODULE}.qweight": codes(torch.int32), f"{MODULE}.scales": HALVES},
    "mlx": {f"{MODULE}.weight": codes(torch.uint32), f"{MODULE}.scales": HALVES},
    "hqq": {f"{MODULE}.W_q": codes(torch.uint8), f"{MODULE}.scale": HALVES},
    "int8": {f"{MODULE}.weight": codes(torch.int8), f"{MODULE}.SCB": torch.ones(4)},
    "nf4": {f"{MODULE}.weight": codes(torch.uint8), f"{MODULE}.weight.absmax": torch.ones(4)},
    "gpt-oss": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": codes(torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": codes(torch.uint8)[:, :2].contiguous(),
    },
}


@pytest.mark.parametrize("name", STORED)
def test_codes_beside_scales_are_refused(tmp_path: Path, name: str) -> None:
    weights = {"model.norm.weight": torch.ones(8), **STORED[name]}
    folder = write_model(tmp_path / "m", weights, llama_config())
    with pytest.raises(SourceError, match="holds the codes of a quantised weight") as caught:
        opened(folder)
    assert next(iter(STORED[name])) in str(caught.value)
    assert "quantization_config" in str(caught.value)


@pytest.mark.parametrize("word", ["int4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("said", ["nothing", "null", "false"])
def test_what_is_written_here_needs_its_config(tmp_path: Path, word: str, said: str) -> None:
    family(tmp_path)
    folder = written(tmp_path, "q", word, "a")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    opened(folder)
    del config["quantization_config"]
    if said != "nothing":
        config["quantization_config"] = json.loads(said)
    file.write_text(json.dumps(config))
    with pytest.raises(SourceError):
        opened(folder)


def test_buffers_of_integers_are_none(tmp_path: Path) -> None:
    buffers = {
        "position_ids": torch.arange(8, dtype=torch.int32)[None],
        "logit_scale": torch.tensor(4.0),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "h.0.attn.c_attn.scale": torch.ones(4),
    }
    folder = write_model(tmp_path / "m", buffers, llama_config())
    assert opened(folder).tensors.keys() == buffers.keys()
