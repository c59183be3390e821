"""The inputs that are mutated: two tiny models, an adapter, recipes, an evaluation, rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["<s>", "</s>", "<pad>", "<|im_start|>", *(f"w{i}" for i in range(12))]
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "torch_dtype": "float32",
}
SHARDED = "model.safetensors.index.json"


def write_inputs(root: Path) -> None:
    """Models a, b (in two shards) and c (other words), adapter, data."""
    for number, name in enumerate("abc"):
        _write_model(root / name, name, number)
    adapter = root / "adapter"
    adapter.mkdir()
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {},
        "inference_mode": True,
        "alpha_pattern": {"q_proj": 8},
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    draw = np.random.default_rng(9)
    factors = {}
    for layer in range(2):
        for module, rows, columns in (("self_attn.q_proj", 8, 8), ("mlp.down_proj", 8, 16)):
            at = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{at}.lora_A.weight"] = draw.standard_normal((2, columns), np.float32)
            factors[f"{at}.lora_B.weight"] = draw.standard_normal((rows, 2), np.float32)
    _save(factors, adapter / "adapter_model.safetensors")
    examples: list[dict[str, Any]] = [
        {"text": "w1 w2 w3"},
        {"prompt": "w1", "completion": "w2"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    ]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in examples) + "\n")


def _write_model(folder: Path, name: str, number: int) -> None:
    folder.mkdir()
    draw = np.random.default_rng(number)
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (16, 8),
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{m}_proj.weight": (8, 8) for m in "qkvo"}
        shapes |= {f"{at}.mlp.{m}_proj.weight": (16, 8) for m in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (8, 16)}
        shapes |= {f"{at}.{m}_layernorm.weight": (8,) for m in ("input", "post_attention")}
    tensors = {key: draw.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if name == "b":
        weight_map: dict[str, str] = {}
        for part in range(2):
            file = f"model-{part + 1:05d}-of-00002.safetensors"
            chosen = {key: tensors[key] for key in list(tensors)[part::2]}
            _save(chosen, folder / file)
            weight_map |= dict.fromkeys(chosen, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / SHARDED).write_text(json.dumps(index))
    else:
        _save(tensors, folder / "model.safetensors")
    words = list(WORDS)
    if name == "c":
        words[5], words[7] = "other", words[5]
    _write_tokenizer(folder, words)


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    added = [{"id": i, "content": words[i], "special": True, **_ADDED} for i in range(4)]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(words)},
            "unk_token": "<pad>",
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", **_ADDED},
        "pad_token": "<pad>",
        "model_max_length": 64,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added
        },
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    generation = {"bos_token_id": 0, "eos_token_id": [1, 5], "do_sample": False}
    for file, content in (
        ("tokenizer.json", document),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", special),
        ("generation_config.json", generation),
        ("added_tokens.json", {"<|im_start|>": 3}),
        ("preprocessor_config.json", {"size": {"height": 2}}),
    ):
        (folder / file).write_text(json.dumps(content))
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n# card\n")


def _save(tensors: dict[str, Any], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file, metadata={"format": "pt"})
