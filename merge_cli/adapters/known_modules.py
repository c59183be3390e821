"""The modules of widespread architectures without transformers, whose import outlasts a merge.

Only a checkpoint that is understood whole is answered for: every stored name and shape has to
follow from the config. The answer is then the one of `pair.ModuleMap`, which a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merge_cli.adapters.pair import ExpertMatrix, Kind, Module, ModuleParameter

# Their layers are called alike: class -> model_type.
_CLASSES = {
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)")


class KnownModules:
    """See `pair.ModuleMap`, which has the same methods.

    Args:
        config: with every size of the model written out.
        name: of a class in `_CLASSES`.
    """

    task_type: str | None = "CAUSAL_LM"

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        hidden, inner, self._layers, heads, key_heads, vocabulary = (config[k] for k in _SIZES)
        width = config.get("head_dim") or hidden // heads
        queries, keys = heads * width, key_heads * width
        norms = ["input_layernorm", "post_attention_layernorm"]
        if name == "Gemma2ForCausalLM":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        self._in_layer: dict[str, tuple[tuple[int, ...], Kind]] = {
            "self_attn.q_proj.weight": ((queries, hidden), "linear"),
            "self_attn.k_proj.weight": ((keys, hidden), "linear"),
            "self_attn.v_proj.weight": ((keys, hidden), "linear"),
            "self_attn.o_proj.weight": ((hidden, queries), "linear"),
            "mlp.gate_proj.weight": ((inner, hidden), "linear"),
            "mlp.up_proj.weight": ((inner, hidden), "linear"),
            "mlp.down_proj.weight": ((hidden, inner), "linear"),
            **{f"{norm}.weight": ((hidden,), "leaf") for norm in norms},
        }
        if name == "Qwen2ForCausalLM":
            for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
                self._in_layer[f"self_attn.{letter}_proj.bias"] = ((rows,), "linear")
        if name == "Qwen3ForCausalLM":
            for letter in "qk":
                self._in_layer[f"self_attn.{letter}_norm.weight"] = ((width,), "leaf")
        self._outside: dict[str, tuple[tuple[int, ...], Kind]] = {
            "model.embed_tokens.weight": ((vocabulary, hidden), "embedding"),
            "model.norm.weight": ((hidden,), "leaf"),
            "lm_head.weight": ((vocabulary, hidden), "linear"),
        }

    def explains(self, stored: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether every stored name and shape follows from the config."""
        return all(self._expected(name)[:1] == (shape,) for name, shape in stored.items())

    def parameters(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleParameter]:
        result = {}
        for name in stored:
            _, kind = self._expected(name)
            module, _, parameter = name.rpartition(".")
            result[name] = ModuleParameter(module, parameter, kind)
        return result

    def modules(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Module]:
        """Those that hold tensors: no other one has a name that ends as theirs do."""
        held: dict[str, Module] = {}
        for parameter in self.parameters(stored).values():
            others = held.get(parameter.module, Module(parameter.kind)).tensors
            held[parameter.module] = Module(parameter.kind, others | {parameter.name})
        return held

    def experts(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[ExpertMatrix, ...]]:
        return {}

    def _expected(self, name: str) -> Any:
        """Shape and kind of module; empty for a name that the model does not have."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self._outside.get(name, ())
        return self._in_layer.get(match[2], ()) if int(match[1]) < self._layers else ()


def known_modules(
    config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> KnownModules | None:
    """The modules of a model; None where transformers has to be asked.

    Args:
        stored: shapes of its tensors.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or _CLASSES.get(name) != config.get("model_type"):
        return None
    sizes = [config.get(key) for key in _SIZES]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    # What an absent width means is up to the class, but for Llama's.
    width = config.get("head_dim")
    if type(width) is not int and (width is not None or name != "LlamaForCausalLM"):
        return None
    modules = KnownModules(config, name)
    return modules if modules.explains(stored) else None
