"""What is said of widespread architectures is what transformers says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from merge_cli.adapters.known_modules import known_modules
from merge_cli.adapters.pair import ModuleMap
from merge_cli.recipe.reference import parse_reference
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source

SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
CLASSES = {
    hf.GemmaForCausalLM: {"head_dim": 6},
    hf.Gemma2ForCausalLM: {"head_dim": 6},
    hf.LlamaForCausalLM: {},
    hf.MistralForCausalLM: {"head_dim": 4},
    hf.Qwen2ForCausalLM: {"head_dim": 4},
    hf.Qwen3ForCausalLM: {"head_dim": 6},
}


def opened(folder: Path, kind: Any, **more: Any) -> tuple[Source, dict[str, tuple[int, ...]]]:
    kind(kind.config_class(**SIZES, **more)).save_pretrained(folder)
    source = open_source(parse_reference(str(folder), folder), folder)
    return source, {name: tensor.shape for name, tensor in source.tensors.items()}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tied", [False, True])
def test_modules_are_those_of_transformers(tmp_path: Path, kind: Any, tied: bool) -> None:
    source, stored = opened(tmp_path, kind, tie_word_embeddings=tied, **CLASSES[kind])
    modules, oracle = known_modules(source.config, stored), ModuleMap(source)
    assert modules is not None
    assert modules.parameters(stored) == oracle.parameters(stored)
    assert set(modules.parameters(stored)) == set(stored)
    assert modules.experts(stored) == oracle.experts(stored)
    assert modules.task_type == oracle.task_type
    known, every = modules.modules(stored), oracle.modules(stored)
    holding = {name: module for name, module in every.items() if module.tensors}
    assert known == {name: holding[name] for name in known}
    assert holding.keys() - known.keys() <= ({"lm_head"} if tied else set())
    for name in known:  # PEFT looks modules up by the ends of their names
        assert [other for other in every if other.endswith(name)] == [name]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "model.layers.1.mlp.down_proj.bias"),
    ],
)
def test_what_is_not_understood_whole_is_left_to_transformers(
    tmp_path: Path, change: dict[str, bool], name: str
) -> None:
    source, stored = opened(tmp_path, hf.LlamaForCausalLM, **change)
    assert name in stored
    assert known_modules(source.config, stored) is None


def test_config_and_tensors_have_to_agree(tmp_path: Path) -> None:
    source, stored = opened(tmp_path, hf.LlamaForCausalLM)
    assert known_modules(source.config, stored) is not None
    config = dict(source.config)
    for key, value in (
        ("num_hidden_layers", 1),
        ("vocab_size", 23),
        ("num_key_value_heads", None),
        ("head_dim", "4"),
        ("model_type", "mistral"),
        ("architectures", ["LlamaModel"]),
        ("architectures", None),
    ):
        assert known_modules({**config, key: value}, stored) is None, key
