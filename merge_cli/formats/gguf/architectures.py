"""The architectures of GGUF files: what their tensors are called here and there, and their shapes.

llama.cpp has one name for what transformers has one model type for, but for Mixtral: to llama.cpp
it is a llama with experts. An architecture is a line of `ARCHITECTURES`, and what its config.json
says in `config`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = {**_ATTENTION, **_MLP}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Gemma 2 and 3 have norms on both sides of attention and MLP.
_FOUR_NORMS = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_BIASED = ("attn_q", "attn_k", "attn_v", "attn_output")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls an architecture, and how its tensors become those of transformers.

    Attributes:
        name: llama.cpp's.
        class_name: transformers' class for text.
        layer: a layer's tensors, by what follows `blk.N.`.
        experts: the stacks of a layer's experts -> the name of one, with a place for its number.
        biases: the key of config.json that says whether a group of them has biases -> the group.
            The key that is empty is one that config.json lacks: then they are always there.
        interleaved: whether rows of queries and keys are in pairs, as Meta's own code rotates
            them; transformers rotates the first half of a head with the second.
        norms_from_one: whether a norm is stored as what it multiplies by, which transformers has
            less one.
        tied: whether llama.cpp has no head of its own for it.
        keys: of its config, besides those that all have.
    """

    name: str
    class_name: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    experts: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False
    norms_from_one: bool = False
    tied: bool = False
    keys: tuple[str, ...] = ()


_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_EXPERT_KEYS = ("expert_count", "expert_used_count")

# By transformers' model type.
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        biases={"attention_bias": _BIASED, "mlp_bias": tuple(_MLP)},
        interleaved=True,
        keys=("attention.sliding_window",),
    ),
    "mixtral": Architecture(
        "llama",
        "MixtralForCausalLM",
        {**_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts={
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        },
        interleaved=True,
        keys=_EXPERT_KEYS,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", biases={"": _BIASED[:3]}),
    "qwen2_moe": Architecture(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        {**_ATTENTION, "ffn_gate_inp": "mlp.gate", **_SHARED_EXPERT},
        experts=_EXPERTS,
        biases={"": _BIASED[:3]},
        keys=(
            *_EXPERT_KEYS,
            "expert_feed_forward_length",
            "expert_shared_feed_forward_length",
        ),
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_LAYER, **_HEAD_NORMS},
        biases={"attention_bias": _BIASED},
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"},
        experts=_EXPERTS,
        biases={"attention_bias": _BIASED},
        keys=(*_EXPERT_KEYS, "expert_feed_forward_length"),
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norms_from_one=True, tied=True),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _FOUR_NORMS,
        norms_from_one=True,
        tied=True,
        keys=("attention.sliding_window", *_SOFTCAPS),
    ),
    "gemma3_text": Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        {**_FOUR_NORMS, **_HEAD_NORMS},
        norms_from_one=True,
        keys=("attention.sliding_window", "rope.freq_base_swa", _SOFTCAPS[1]),
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        keys=("attention.sliding_window",),
    ),
}


def model_type_of(name: object, has_experts: bool) -> str:
    """Transformers' model type of an architecture; empty for one that is not read."""
    named = {key: kind for key, kind in ARCHITECTURES.items() if kind.name == name}
    fits = [key for key, kind in named.items() if bool(kind.experts) == has_experts]
    return fits[0] if fits else next(iter(named), "")


@dataclass(frozen=True)
class Shapes:
    """The sizes that shapes are made of.

    Attributes:
        experts, expert_mlp, shared_mlp: of a mixture; 0 without one.
        fused: whether gate and up are one matrix.
    """

    vocabulary: int
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    experts: int = 0
    expert_mlp: int = 0
    shared_mlp: int = 0
    fused: bool = False

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by what the file calls it within its layer."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        expert = (self.experts, self.expert_mlp, self.hidden)
        matrices = {
            "token_embd": (self.vocabulary, self.hidden),
            "output": (self.vocabulary, self.hidden),
            "attn_q": (queries, self.hidden),
            "attn_k": (keys, self.hidden),
            "attn_v": (keys, self.hidden),
            "attn_qkv": (queries + 2 * keys, self.hidden),
            "attn_output": (self.hidden, queries),
            "ffn_gate": (self.mlp, self.hidden),
            "ffn_up": (self.mlp * (2 if self.fused else 1), self.hidden),
            "ffn_down": (self.hidden, self.mlp),
            "ffn_gate_inp": (self.experts, self.hidden),
            "ffn_gate_exps": expert,
            "ffn_up_exps": expert,
            "ffn_down_exps": (self.experts, self.hidden, self.expert_mlp),
            "ffn_gate_shexp": (self.shared_mlp, self.hidden),
            "ffn_up_shexp": (self.shared_mlp, self.hidden),
            "ffn_down_shexp": (self.hidden, self.shared_mlp),
            "attn_q_norm": (self.head,),
            "attn_k_norm": (self.head,),
        }
        return matrices.get(name, (self.hidden,))


@dataclass(frozen=True)
class Expected:
    """A tensor that a file should have.

    Attributes:
        name, shape: in the file.
        names: Hugging Face's: one, or one for each expert of a stack.
        new_shape: of each of those.
    """

    name: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    new_shape: tuple[int, ...]


def expected_tensors(
    architecture: Architecture, shapes: Shapes, present: Container[str]
) -> Iterator[Expected]:
    """Every tensor that a file should have, in the order of its layers."""
    for name, new_name in TOP.items():
        is_tied = architecture.tied or "output.weight" not in present
        if name != "output" or not is_tied:  # else the head is the embedding
            shape = shapes.of(name)
            yield Expected(f"{name}.weight", shape, (f"{new_name}.weight",), shape)
    biased = {name for group in with_bias(architecture, present).values() for name in group}
    for layer in range(shapes.layers):
        old, new = f"blk.{layer}", f"model.layers.{layer}"
        for name, new_name in architecture.layer.items():
            shape = shapes.of(name)
            # The gate of a shared expert is one row, which llama.cpp stores as a vector.
            new_shape = (1, *shape) if name == "ffn_gate_inp_shexp" else shape
            yield Expected(f"{old}.{name}.weight", shape, (f"{new}.{new_name}.weight",), new_shape)
            if name in biased:
                bias = shape[:1]
                yield Expected(f"{old}.{name}.bias", bias, (f"{new}.{new_name}.bias",), bias)
        for name, pattern in architecture.experts.items():
            shape = shapes.of(name)
            numbers = range(shapes.experts)
            names = tuple(f"{new}.{pattern.format(number)}.weight" for number in numbers)
            yield Expected(f"{old}.{name}.weight", shape, names, shape[1:])


def with_bias(architecture: Architecture, present: Container[str]) -> dict[str, tuple[str, ...]]:
    """The groups that have biases in a file: of a group all do, or none."""
    return {
        key: group
        for key, group in architecture.biases.items()
        if not key or any(f"blk.0.{name}.bias" in present for name in group)
    }


def is_norm(name: str) -> bool:
    """Whether a tensor of a file is the weight of a norm."""
    return name.endswith("norm.weight")
