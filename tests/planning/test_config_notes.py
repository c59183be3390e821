"""Configs that give the same weights another meaning are told, key by key; others are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge_cli
from merge_cli.checkpoint.class_config import written_out
from merge_cli.checkpoint.config import class_defaults
from merge_cli.planning.config_keys import ignored_keys
from merge_cli.planning.config_notes import config_notes
from merge_cli.sources.source import Source
from tests.support.tiny import Family, llama_config


def notes(one: dict[str, Any], *others: dict[str, Any]) -> list[str]:
    """Of models a, b, ...; the lines without what all of them have in common."""
    configs = zip("abcd", (one, *others), strict=False)
    sources = [Source(name, Path(name), config, {}, {}) for name, config in configs]
    lines = list(config_notes(sources, 0))
    assert all(line.startswith("config.json: ") for line in lines)
    assert all(line.endswith("; the output has that of a") for line in lines)
    return [line[len("config.json: ") : -len("; the output has that of a")] for line in lines]


BASE: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("rope_theta", 10000.0, 1000000.0),
        ("hidden_act", "silu", "gelu"),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("sliding_window", None, 4096),
        ("num_attention_heads", 4, 8),
        ("logit_scale", 1.0, 0.5),
        ("final_logit_softcapping", 30.0, None),
        ("attention_multiplier", 0.1, 0.2),
        ("embedding_multiplier", 12, 6),
        ("num_experts_per_tok", 2, 4),
        ("norm_topk_prob", True, False),
        ("tie_word_embeddings", True, False),
        ("layer_types", ["full_attention", "sliding_attention"], ["sliding_attention"] * 2),
        ("partial_rotary_factor", 0.5, 1.0),
        ("a_key_of_next_year", 1, 2),
        ("model_type", "llama", "mistral"),
    ],
)
def test_what_matters_is_told(key: str, one: Any, other: Any) -> None:
    (line,) = notes({**BASE, key: one}, {**BASE, key: other})
    shown = [json.dumps(v) if v is not None else "nothing" for v in (one, other)]
    shown = [text.removesuffix(".0") for text in shown]
    assert line == f"{key} differs: a {shown[0]}; b {shown[1]}"


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("_name_or_path", "x", "y"),
        ("transformers_version", "4.40.0", "5.1.0"),
        ("torch_dtype", "float32", "bfloat16"),
        ("use_cache", True, False),
        ("initializer_range", 0.02, 0.01),
        ("attention_dropout", 0.0, 0.1),
        ("resid_pdrop", 0.0, 0.1),
        ("eos_token_id", 2, [2, 3]),
        ("pad_token_id", 0, 7),
        ("architectures", ["LlamaForCausalLM"], ["LlamaModel"]),
        ("vocab_size", 10, 20),
        ("temperature", 0.7, 1.0),
        ("rope_theta", 10000, 10000.0),
        ("hidden_act", "silu", "swish"),
    ],
)
def test_what_does_not_matter_is_not(key: str, one: Any, other: Any) -> None:
    assert notes({**BASE, key: one}, {**BASE, key: other}) == []


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None},
         {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
         {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}),
        ({}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ({}, {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "head_dim": 16,
              "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6}),
        ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ({"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False,
          "max_window_layers": 28},
         {"model_type": "qwen2", "sliding_window": None, "use_sliding_window": False,
          "layer_types": ["full_attention"] * 28}),
        ({"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False},
         {"model_type": "qwen2"}),
        ({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
          "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
         {"model_type": "gemma3_text", "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        ({"model_type": "gpt2", "n_head": 4, "activation_function": "gelu_new"},
         {"model_type": "gpt2", "n_head": 4, "reorder_and_upcast_attn": False}),
    ],
)  # fmt: skip
def test_two_spellings_of_one_thing(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert notes({**BASE, **one}, {**BASE, **other}) == []
    assert notes({**BASE, **other}, {**BASE, **one}) == []


GEMMA: dict[str, Any] = {"model_type": "gemma2", "num_hidden_layers": 2}
KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GEMMA, {**GEMMA, "layer_types": KINDS}),
        ({"model_type": "t5"}, {"model_type": "t5", "scale_decoder_outputs": True}),
        ({"model_type": "t5", "tie_word_embeddings": False},
         {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}),
    ],
)  # fmt: skip
def test_what_only_newer_configs_say(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Their classes say the same of the old ones."""
    assert not notes(one, other)
    assert not notes(other, one)


def test_what_a_class_says_otherwise_is_told() -> None:
    (line,) = notes(GEMMA, {**GEMMA, "layer_types": KINDS[::-1]})
    assert line.startswith("layer_types differs: a nothing; b [")
    assert notes({"model_type": "t5"}, {"model_type": "t5", "scale_decoder_outputs": False})


def test_a_silent_config_has_the_default_of_its_class() -> None:
    assert notes(BASE, {**BASE, "rope_theta": 5e5}) == ["rope_theta differs: a 10000; b 500000"]
    mistral = {**BASE, "model_type": "mistral"}
    assert notes(mistral, {**mistral, "sliding_window": None}) == [
        "sliding_window differs: a 4096; b nothing"
    ]
    assert notes({**BASE, "head_dim": 32}, BASE) == ["head_dim differs: a 32; b 16"]
    assert notes({**BASE, "model_type": "mine"}, {**BASE, "model_type": "mine", "scale": 2}) == [
        "scale differs: a nothing; b 2"
    ]


def test_every_scaling_key_and_every_model() -> None:
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    found = notes(BASE, {**BASE, **linear}, {**BASE, "rope_scaling": LLAMA3}, BASE)
    assert found[:2] == [
        "rope_scaling.factor differs: a, d nothing; b 2; c 8",
        'rope_scaling.rope_type differs: a, c, d nothing; b "linear"',
    ]


def test_a_text_model_and_one_that_sees() -> None:
    seeing = {
        "model_type": "vlm", "image_token_id": 7, "vision_config": {"depth": 4},
        "text_config": {**BASE, "rope_theta": 1e6, "_name_or_path": "x"},
    }  # fmt: skip
    assert notes(seeing, BASE) == [
        'model_type differs: a "vlm"; b "llama"',
        "rope_theta differs: a 1000000; b 10000",
    ]
    deeper = {**seeing, "vision_config": {"depth": 5}, "image_token_id": 8}
    assert notes(seeing, deeper) == [
        "image_token_id differs: a 7; b 8",
        "vision_config.depth differs: a 4; b 5",
    ]


LAYERS = [f"{'full' if i % 6 == 5 else 'sliding'}_attention" for i in range(48)]


def test_long_values_are_told_where_they_differ() -> None:
    """However far behind: values are compared whole, and cut for the line alone."""
    for at in (0, 3, 47):
        other = [*LAYERS]
        other[at] = "chunked_attention"
        (line,) = notes({**BASE, "layer_types": LAYERS}, {**BASE, "layer_types": other})
        assert line == (f'layer_types[{at}] differs: a "{LAYERS[at]}"; b "chunked_attention"')
    factors = [1.0 + i / 100 for i in range(48)]
    longrope = {"type": "longrope", "long_factor": factors, "short_factor": factors}
    changed = {**longrope, "long_factor": [*factors[:-1], 64.0]}
    (line,) = notes({**BASE, "rope_scaling": longrope}, {**BASE, "rope_scaling": changed})
    assert line == "rope_scaling.long_factor[47] differs: a 1.47; b 64"
    labels = {str(i): f"label{i}" for i in range(40)}
    one, other_one = {**BASE, "id2label": labels}, {**BASE, "id2label": {**labels, "39": "none"}}
    assert notes(one, other_one) == ['id2label.39 differs: a "label39"; b "none"']
    text = "x" * 200
    (line,) = notes({**BASE, "words": text + "a"}, {**BASE, "words": text + "b"})
    assert line == f'words differs: a ...{"x" * 20}a"; b ...{"x" * 20}b"'
    (line,) = notes({**BASE, "words": text}, {**BASE, "words": text + "b"})
    assert line.endswith('b"')
    assert notes({**BASE, "sizes": [1.0, {"a": 2}]}, {**BASE, "sizes": [1, {"a": 2.0}]}) == []


def test_configs_in_configs_are_read_as_configs() -> None:
    """Whatever their key is called."""

    def pair(**keys: Any) -> dict[str, Any]:
        parts = {"model_type": "t5gemma", "architectures": ["T5GemmaForConditionalGeneration"]}
        decoder = {"model_type": "t5_gemma_module", "vocab_size": 9, "rms_norm_eps": 1e-6, **keys}
        return {**parts, "encoder": {"model_type": "t5_gemma_module"}, "decoder": decoder}

    assert notes(pair(), pair(rms_norm_eps=1e-5)) == [
        "decoder.rms_norm_eps differs: a 1e-06; b 1e-05"
    ]
    assert notes(pair(), pair(attention_dropout=0.5, vocab_size=10)) == []


@pytest.mark.parametrize(
    ("model_type", "default"), [("phi", 0.5), ("glm", 0.5), ("nemotron", 0.5), ("stablelm", 0.25)]
)
def test_a_default_that_a_class_computes_is_its_own(model_type: str, default: float) -> None:
    silent = {**BASE, "model_type": model_type}
    assert notes(silent, {**silent, "partial_rotary_factor": default}) == []
    assert notes({**silent, "partial_rotary_factor": default}, silent) == []
    (line,) = notes(silent, {**silent, "partial_rotary_factor": 1.0})
    assert line.startswith("partial_rotary_factor differs: a nothing; b 1")


def test_where_both_spellings_stand_each_counts() -> None:
    for empty in ({"hidden_activation": None}, {}):
        one = {**BASE, "hidden_act": "gelu_pytorch_tanh", **empty}
        other = {**BASE, "hidden_act": "silu", **empty}
        expected = ['hidden_act differs: a "gelu_pytorch_tanh"; b "silu"']
        assert notes(one, other) == expected
        assert notes(dict(reversed(one.items())), dict(reversed(other.items()))) == expected
    both = {**BASE, "hidden_act": "gelu", "hidden_activation": "silu"}
    assert notes(both, {**both, "hidden_act": "relu"}) == ['hidden_act differs: a "gelu"; b "relu"']
    assert notes(both, {**both, "hidden_activation": "relu"}) == [
        'hidden_activation differs: a "silu"; b "relu"'
    ]


@pytest.mark.parametrize(
    ("model_type", "architecture", "told"),
    [
        ("llama", "LlamaForCausalLM", False),
        ("llama", "LlamaForSequenceClassification", True),
        ("bert", "BertModel", True),
        ("roberta", "RobertaForMaskedLM", True),
        ("roberta", "RobertaForCausalLM", True),
        ("m2m_100", "M2M100ForConditionalGeneration", True),
        ("whisper", "WhisperForConditionalGeneration", False),
    ],
)
def test_tokens_that_a_class_computes_with_are_told(
    model_type: str, architecture: str, told: bool
) -> None:
    """RoBERTa counts positions from the padding's number, and a classifier pools before it."""
    one = {"model_type": model_type, "architectures": [architecture], "pad_token_id": 1}
    assert notes(one, {**one, "pad_token_id": 5}) == ["pad_token_id differs: a 1; b 5"] * told


def test_every_key_of_every_class_is_told_or_listed() -> None:
    """A change of the last entry of any value of any config that transformers has."""
    import transformers

    def changed(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        if isinstance(value, str):
            return value + "x"
        return [*value[:-1], changed(value[-1])] if isinstance(value, list) and value else None

    transformers.logging.set_verbosity_error()
    windows = ("sliding_window", "max_window_layers", "use_sliding_window")  # of no layer
    for kind in [*transformers.CONFIG_MAPPING][::7]:
        try:
            text = transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False)
        except Exception:  # wants arguments, or a package that is not here
            continue
        config = json.loads(text)
        for key, value in config.items():
            other = {**config, key: changed(value)}
            is_listed = ignored_keys(config, counts_layers=True).search(key)
            if other[key] is None or is_listed or notes(config, other):
                continue
            # Not told: transformers itself takes both to mean the same, or there is no window.
            assert key in windows or written_out(config) == written_out(other), (kind, key)


def test_what_the_whole_says_beside_its_language_model() -> None:
    """By a key that both have: the part's counts as the model's own, the whole's as the whole's."""
    text = {**BASE, "projection_dim": 8}
    whole = {"model_type": "clip", "text_config": text, "projection_dim": 8}
    assert notes(whole, {**whole, "projection_dim": 9}) == [
        "projection_dim of the whole model differs: a 8; b 9"
    ]
    assert notes(whole, {**whole, "text_config": {**text, "projection_dim": 9}}) == [
        "projection_dim differs: a 8; b 9"
    ]
    assert notes(whole, {**whole, "text_config": {**text, "model_type": "mistral"}}) == [
        'model_type of the language model differs: a "llama"; b "mistral"'
    ]


def test_strange_values_do_no_harm() -> None:
    one = {**BASE, "model_type": ["x"], "rope_scaling": "no", "layer_types": 3, "x": {"y": [1]}}
    assert len(notes(one, {**BASE, "hidden_act": {}, "rope_parameters": {}})) >= 3
    long = notes({**BASE, "layer_list": list(range(100))}, BASE)
    assert len(long[0]) < 120


def test_in_plan_and_report(family: Family) -> None:
    config = {**llama_config(), "rope_theta": 123456.0}
    (family.folder / "b" / "config.json").write_text(json.dumps(config))
    recipe = family.folder / "r.yaml"
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["a", "b"]}
    recipe.write_text(yaml.safe_dump(document))
    line = "config.json: rope_theta differs: base, a 10000; b 123456; the output has that of base"
    assert line in merge_cli.plan(recipe).notes
    assert line in merge_cli.merge(recipe, family.folder / "out").report["notes"]


def test_defaults_are_read_and_nothing_is_imported() -> None:
    assert class_defaults("llama")["hidden_act"] == "silu"
    assert class_defaults("qwen2_5_vl_text")["model_type"] == "qwen2_5_vl_text"
    for strange in ("no_such_model", "../llama", "", "a" * 200):
        assert class_defaults(strange) == {}
