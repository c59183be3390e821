"""Which keys of a config change the function that weights stand for: all but those listed here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.layer_config import LAYER_COUNTS

# What does not change the function that weights stand for: names and versions; what training and
# generating alone look at; what headers or the tokenizers are compared for; how, not what, is
# computed. Every other key counts.
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
_IGNORED_KINDS = re.compile(r"^(?!token_dropout$).*(dropout|_pdrop$|drop_path)")  # ESM's counts
_TOKENS = re.compile(r"(^|_)(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id$")
# Generating needs these tokens. Classes that pool at the last token, or hide masked ones, compute
# with them; and so do those that count positions from the number of the padding (transformers 5).
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_POSITIONS_FROM_PADDING = (
    "camembert",
    "data2vec-text",
    "fsmt",
    "ibert",
    "kosmos-2",
    "kosmos-2.5",
    "m2m_100",
    "mpnet",
    "nllb-moe",
    "roberta",
    "roberta-prelayernorm",
    "seamless_m4t",
    "seamless_m4t_v2",
    "speech_to_text",
    "speecht5",
    "trocr",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def ignored_keys(config: Mapping[str, Any], *, counts_layers: bool) -> re.Pattern[str]:
    """Which keys do not matter in this config, as an expression to search a key for.

    Args:
        counts_layers: whether the number of layers matters.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    types = [part.get("model_type") for part in (config, text_config(config))]
    generates = name is None or (isinstance(name, str) and name.endswith(_GENERATES))
    harmless = generates and not any(kind in _POSITIONS_FROM_PADDING for kind in types)
    keys = _IGNORED - {*LAYER_COUNTS} if counts_layers else _IGNORED
    kinds = [_IGNORED_KINDS, *([_TOKENS] if harmless else [])]
    exact = "|".join(re.escape(key) for key in sorted(keys))
    return re.compile("|".join([f"^(?:{exact})$", *(kind.pattern for kind in kinds)]))
