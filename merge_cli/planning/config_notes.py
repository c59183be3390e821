"""Configs that give the same weights another meaning: a note for each key that differs.

Keys that are known not to matter are listed here; every other difference is reported. Two spellings
of one meaning are brought to one form first: transformers 4 and 5 write rotary embeddings
differently, and what one config leaves out another may write down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_cli.checkpoint.class_config import written_out
from merge_cli.checkpoint.config import class_defaults, text_config
from merge_cli.checkpoint.layer_config import LAYER_COUNTS
from merge_cli.sources.source import Source

# Names and versions; what training and generating alone look at; what headers or the tokenizers
# are compared for; how, not what, is computed.
_IGNORED = frozenset(
    (
        *LAYER_COUNTS,
        "architectures",
        "_name_or_path",
        "name_or_path",
        "model_name",
        "auto_map",
        "transformers_version",
        "_diffusers_version",
        "dtype",
        "torch_dtype",
        "vocab_size",
        "tokenizer_class",
        "finetuning_task",
        "problem_type",
        "task_specific_params",
        "quantization_config",
        "unsloth_version",
        "unsloth_fixed",
        "initializer_range",
        "initializer_factor",
        "init_std",
        "gradient_checkpointing",
        "layerdrop",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_past",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_jitter_noise",
        "aux_loss_alpha",
        "seq_aux",
        "return_dict",
        "torchscript",
        "use_bfloat16",
        "pruned_heads",
        "pretraining_tp",
        "chunk_size_feed_forward",
        "use_cache",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "use_flash_attn",
        "use_flash_attention_2",
        "use_mamba_kernels",
        "ep_size",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "generation_config",
        "dense_act_fn",
        "is_gated_act",  # follow from feed_forward_proj
    )
)
_IGNORED_KINDS = re.compile(
    r"(^|_)(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id$|dropout|_pdrop$|drop_path"
)
_SPELLINGS = {
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "rotary_pct": "partial_rotary_factor",
}
_ACTIVATIONS = {"swish": "silu"}
# What is meant where nothing is said, whatever the class.
_PLAIN: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "qkv_bias": False,
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
}
_LENGTH = 60


def config_notes(sources: Sequence[Source], config_index: int) -> Iterator[str]:
    """A line for each key that does not mean the same in all sources, with every value.

    Args:
        config_index: of the source whose config the output has.
    """
    described = [source for source in sources if source.config]
    if len({json.dumps(source.config, sort_keys=True) for source in described}) < 2:
        return
    meanings = [_Meaning(source.config) for source in described]
    written: list[_Meaning] = []
    for key in dict.fromkeys(key for meaning in meanings for key in meaning.settings):
        alone = key in _FOR_ALL or not any(key in meaning.around for meaning in meanings)
        values: dict[str, list[str]] = {}
        for source, meaning in zip(described, meanings, strict=True):
            if alone or meaning.is_nested:  # else it has no such part at all
                values.setdefault(_shown(meaning.value(key)), []).append(source.label)
        if len(values) > 1 and not (
            ("nothing" in values or key in _FOR_ALL) and _alike(key, described, written)
        ):
            notes = "; ".join(f"{', '.join(who)} {value}" for value, who in values.items())
            whose = sources[config_index].label
            yield f"config.json: {key} differs: {notes}; the output has that of {whose}"


def _alike(key: str, sources: Sequence[Source], written: list[_Meaning]) -> bool:
    """Whether transformers takes all configs to mean the same by a key that some leave out.

    Old configs of Gemma 2 say nothing of what each layer is, and T5's class has one key for
    another. It takes a second to ask.

    Args:
        written: the configs written out, filled when this is asked for the first time.
    """
    if not written:
        result = [written_out(source.config) for source in sources]
        written += [_Meaning(config or {}) for config in result]
    return all(key in item.settings for item in written) and (
        len({_shown(meaning.settings[key]) for meaning in written}) == 1
    )


_FOR_ALL = ("model_type", "tie_word_embeddings")


class _Meaning:
    """What a config says by key, its language model's keys as if they were its own.

    Attributes:
        settings: what it does say, of what matters.
        around: keys of the whole that its language model is a part of.
        is_nested: whether it is a part.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._text = text_config(config)
        self.is_nested = self._text is not config
        self.settings = _normal(self._text)
        self.around: frozenset[str] = frozenset()
        if self.is_nested:
            whole = _normal({k: value for k, value in config.items() if value is not self._text})
            self.around = frozenset(whole.keys() - self.settings.keys())
            self.settings = {**whole, **self.settings}
            self.settings |= {key: whole[key] for key in _FOR_ALL if key in whole}
        self._config = config

    def value(self, key: str) -> Any:
        """What it means by a key, whether it says so or not; None where nobody knows."""
        value = self.settings.get(key)
        if value is None and key not in self.settings:
            value = self._default(key)
        return self._implied(key) if value is None else value

    def _implied(self, key: str) -> Any:
        heads, width = self.settings.get("num_attention_heads"), self.settings.get("hidden_size")
        if key == "num_key_value_heads":
            return heads
        if key == "head_dim" and type(heads) is int and type(width) is int and heads > 0:
            return width // heads
        return None

    def _default(self, key: str) -> Any:
        if key in _PLAIN:
            return _PLAIN[key]
        part, _, inner = key.rpartition(".")
        part_config = self._config.get(part) if part else self._text
        if part.startswith("rope_scaling") or not isinstance(part_config, Mapping):
            return None
        return _silent(part_config, inner)


def _silent(config: Mapping[str, Any], key: str) -> Any:
    """The default of a config's class; None where it is not known."""
    kind = config.get("model_type")
    defaults = class_defaults(kind) if isinstance(kind, str) else {}
    if key in ("rope_theta", "rope_local_base_freq") and key not in defaults and defaults:
        base = defaults.get("default_theta", 10000.0)
        local = key == "rope_local_base_freq"
        return base.get("local" if local else "global") if isinstance(base, dict) else base
    names = (old for old, new in _SPELLINGS.items() if new == key and old in defaults)
    return defaults.get(next(names, key))


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that matter, in one spelling."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        key = _SPELLINGS.get(key, key)
        if key in _IGNORED or _IGNORED_KINDS.search(key) or key in _ROTARY:
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            result |= {f"{key}.{inner}": item for inner, item in _normal(value).items()}
        else:
            result[key] = _ACTIVATIONS.get(value, value) if isinstance(value, str) else value
    kinds = result.get("layer_types")
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    windowed = result.get("use_sliding_window", _silent(config, "use_sliding_window"))
    if full or windowed is False:  # then there is no window, whatever its size
        result |= dict.fromkeys(("sliding_window", "max_window_layers", "layer_types"))
        result["use_sliding_window"] = False
    return result | _rotary(config)


_ROTARY = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "rotary_pct",
)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about rotary embeddings, whether it is written as before version 5 or since."""
    values = {key: config[key] for key in ("rope_theta", "rope_local_base_freq") if key in config}
    share = config.get("partial_rotary_factor", config.get("rotary_pct"))
    if share is not None:
        values["partial_rotary_factor"] = share
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if not isinstance(scaling, dict):
            continue
        if scaling and all(isinstance(item, dict) or item is None for item in scaling.values()):
            # One set for each kind of layers, the sliding ones formerly under a key of their own.
            local = dict(scaling.get("sliding_attention") or {})
            if "rope_theta" in local:
                values["rope_local_base_freq"] = local.pop("rope_theta")
            values |= _scaling(local, "rope_scaling.sliding_attention.")
            scaling = scaling.get("full_attention") or {}
        values |= _scaling(scaling, "rope_scaling.")
    return {key: value for key, value in values.items() if value is not None}


def _scaling(scaling: Mapping[str, Any], before: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    kind = scaling.get("rope_type", scaling.get("type"))
    for key, value in scaling.items():
        if key in ("rope_theta", "partial_rotary_factor"):
            result[key] = value
        elif key not in ("type", "rope_type"):
            result[before + key] = value
    if kind not in (None, "default"):
        result[f"{before}rope_type"] = kind
    return result


def _shown(value: Any) -> str:
    """A value in a line; numbers that are equal look alike."""
    if value is None:
        return "nothing"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."
