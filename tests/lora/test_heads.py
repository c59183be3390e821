"""Which ends of a model an adapter trains, decided from headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.errors import MismatchError, SourceError
from merge_cli.lora.application import AppliedAdapter, apply_adapter
from merge_cli.lora.heads import changed_config, find_embedding_and_head

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
PREFIX = "base_model.model."


def refs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRef]:
    return {
        name: TensorRef(name, Path("file"), "F32", shape, 0, 4 * math.prod(shape))
        for name, shape in shapes.items()
    }


def applied(
    base: Mapping[str, tuple[int, ...]],
    adapter: Mapping[str, tuple[int, ...]],
    about: dict[str, Any],
    **config: Any,
) -> AppliedAdapter:
    stored = refs({PREFIX + name: shape for name, shape in adapter.items()})
    return apply_adapter(refs(base), {**CONFIG, **config}, stored, label="base+adapter",
                         fingerprint="", base=about)  # fmt: skip


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens", "lm_head"), ("transformer.wte", "lm_head"), ("wte", "lm_head"),
        ("gpt_neox.embed_in", "embed_out"), ("transformer.word_embeddings", "lm_head"),
        ("model.language_model.embed_tokens", "lm_head"),
        ("language_model.model.embed_tokens", "language_model.lm_head"),
        ("thinker.model.embed_tokens", "thinker.lm_head"),
    ],
)  # fmt: skip
def test_where_the_head_of_a_tied_model_would_be(embedding: str, head: str) -> None:
    tensors = refs({f"{embedding}.weight": (8, 4), "vision_tower.embeddings.weight": (3, 4)})
    ends = find_embedding_and_head(tensors, {"architectures": ["AnyForCausalLM"]})
    assert (ends.embedding, ends.head, ends.tied) == (f"{embedding}.weight", f"{head}.weight", True)
    found = applied({f"{embedding}.weight": (8, 4)}, {f"{embedding}.weight": (8, 4)},
                    {"tie_word_embeddings": True}, modules_to_save=[embedding])  # fmt: skip
    assert found.tensors.keys() == {f"{embedding}.weight", f"{head}.weight"}
    assert found.changes == {"tie_word_embeddings": False}


def test_a_model_without_a_head_gets_none() -> None:
    found = applied({"embed_tokens.weight": (8, 4)}, {"embed_tokens.weight": (8, 4)},
                    {"architectures": ["Qwen2Model"], "tie_word_embeddings": True},
                    modules_to_save=["embed_tokens"])  # fmt: skip
    assert found.tensors.keys() == {"embed_tokens.weight"}
    assert not found.changes


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "shared"),
        ({"architectures": ["BertForMaskedLM"]}, "bert.embeddings.word_embeddings"),
    ],
)
def test_words_that_are_tied_in_other_ways_are_refused(about: dict[str, Any], name: str) -> None:
    base = {f"{name}.weight": (8, 4), "layer.0.q.weight": (4, 4)}
    factors = {f"{name}.lora_embedding_A": (2, 8), f"{name}.lora_embedding_B": (4, 2)}
    with pytest.raises(MismatchError, match="uses more than once"):
        applied(base, factors, about)
    plain = {"layer.0.q.lora_A.weight": (2, 4), "layer.0.q.lora_B.weight": (4, 2)}
    assert not applied(base, plain, about).changes


def test_a_copy_of_the_embedding_is_no_head() -> None:
    """What PEFT saves beside the factors after a model was resized."""
    copies = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)}
    base = {"model.embed_tokens.weight": (8, 4)}
    found = applied(base, copies, {"tie_word_embeddings": True, "vocab_size": 8})
    assert found.tensors.keys() == base.keys()
    assert found.changes == {"vocab_size": 10}
    with pytest.raises(MismatchError, match="the model lacks it"):
        applied(base, {"lm_head.weight": (10, 4)}, {"tie_word_embeddings": True})
    with pytest.raises(MismatchError, match="the model lacks it"):  # tied to what is not there
        applied(base, {"lm_head.weight": (8, 4)}, {"tie_word_embeddings": True},
                ensure_weight_tying=True, modules_to_save=["embed_tokens"])  # fmt: skip


@pytest.mark.parametrize(
    ("embedding", "keys", "tied"),
    [
        ("model.embed_tokens", {"modules_to_save": ["embed_tokens"]}, True),
        ("transformer.wte", {"modules_to_save": ["wte"]}, False),
        ("transformer.wte", {"modules_to_save": ["transformer.wte"]}, False),
        ("transformer.wte", {"modules_to_save": ["wte", "transformer.wte"]}, True),
        ("transformer.wte", {"modules_to_save": ["wte"], "target_modules": "lm_head|q"}, True),
        ("transformer.wte", {"modules_to_save": ["wte"], "target_modules": r".*\.q"}, False),
    ],
)
def test_what_peft_trains_as_one(embedding: str, keys: dict[str, Any], tied: bool) -> None:
    """It asks for two names alone, whatever the model calls its embedding."""
    name = f"{embedding}.weight"
    found = applied({name: (8, 4)}, {name: (8, 4)}, {"tie_word_embeddings": True},
                    ensure_weight_tying=True, **keys)  # fmt: skip
    assert ("lm_head.weight" not in found.tensors) is tied
    assert (found.changes == {}) is tied


def test_a_trained_and_resized_embedding_is_saved_three_times() -> None:
    """The plain name is the trained one, as PEFT loads it."""
    name = "model.embed_tokens"
    copies = {f"{name}.{wrapper}weight": (10, 4)
              for wrapper in ("original_module.", "modules_to_save.", "")}  # fmt: skip
    base = {f"{name}.weight": (8, 4), "lm_head.weight": (10, 4)}
    for order in (list(copies), list(copies)[::-1]):
        stored = refs({PREFIX + one: copies[one] for one in order})
        sources = {one: ref._replace(offset=i) for i, (one, ref) in enumerate(stored.items())}
        found = apply_adapter(refs(base), {**CONFIG, "modules_to_save": ["embed_tokens"]}, sources,
                              label="base+adapter", fingerprint="", base={})  # fmt: skip
        assert found.tensors.keys() == base.keys()
        assert found.tensors[f"{name}.weight"].stored[0].offset == order.index(f"{name}.weight")


@pytest.mark.parametrize(("version", "kept"), [("5.2.0", True), ("4.50.0", False)])
def test_a_head_of_its_own_in_a_model_whose_config_ties(version: str, kept: bool) -> None:
    base = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
    about = {"tie_word_embeddings": True, "transformers_version": version}
    found = applied(base, {"model.embed_tokens.weight": (8, 4)}, about,
                    modules_to_save=["embed_tokens"])  # fmt: skip
    assert (found.tensors["lm_head.weight"].name == "lm_head.weight") is kept


def test_contents_that_contradict_the_config() -> None:
    base = {"model.layers.0.q.weight": (4, 4)}
    name = "model.layers.0.q"
    plain = {f"{name}.lora_A.weight": (2, 4), f"{name}.lora_B.weight": (4, 2)}
    length = {f"{name}.lora_magnitude_vector": (4,)}
    twice = {**plain, f"{name}.base_layer.weight": (4, 4), f"{name}.weight": (4, 4)}
    empty = {f"{name}.lora_A.weight": (0, 4), f"{name}.lora_B.weight": (4, 0)}
    about: dict[str, Any] = {}
    for adapter, config, said in (
        (plain, {"r": 3}, "have the rank 2, but adapter_config.json says 3"),
        (plain, {"use_dora": True}, "no magnitude for it"),
        ({**plain, **length}, {"use_dora": False}, "use_dora is not set"),
        (twice, {}, "holds it twice"),
        (empty, {"r": None}, "do not make"),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match=said):
            applied(base, adapter, about, **config)
    with pytest.raises(SourceError, match="changes nothing"):
        applied(base, {}, about)


def test_without_a_rank_a_config_means_pefts_own() -> None:
    name = "model.layers.0.q"
    base, stored = refs({f"{name}.weight": (16, 16)}), f"{PREFIX}{name}"
    config = {key: value for key, value in CONFIG.items() if key != "r"}
    for rank, refused in ((8, False), (4, True)):
        parts = {f"{stored}.lora_A.weight": (rank, 16), f"{stored}.lora_B.weight": (16, rank)}
        about: dict[str, Any] = {"label": "base+adapter", "fingerprint": "", "base": {}}
        if not refused:
            assert apply_adapter(base, config, refs(parts), **about).tensors
            continue
        with pytest.raises(MismatchError, match="have the rank 4, but adapter_config.json says 8"):
            apply_adapter(base, config, refs(parts), **about)


def test_a_nested_config_is_changed_where_it_says_so() -> None:
    about = {"text_config": {"vocab_size": 8, "tie_word_embeddings": True}, "other": 1}
    found = changed_config(about, {"vocab_size": 9, "tie_word_embeddings": False})
    assert found == {"text_config": {"vocab_size": 9, "tie_word_embeddings": False}, "other": 1,
                     "tie_word_embeddings": False}  # fmt: skip
    assert about["text_config"] == {"vocab_size": 8, "tie_word_embeddings": True}
