"""Merged folders open in transformers: no key missing or unexpected, weights right, text comes out.

Every model is tiny and made here from its transformers config, except the committed family of
real ones. Parents and result are compared as transformers loads them, so that its conversions of
names (fused experts, nested language models, old buffers) are under test, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import MismatchError, RecipeError
from merge_cli.options import MergeOptions
from tests.support.architectures import (
    COMMON,
    DECODER,
    MOE,
    VOCABULARY,
    Architecture,
    Parents,
    deepseek,
    disturb,
    recipe_for,
    state_of,
    write_parents,
)
from tests.support.command import cli
from tests.support.paths import ROOT
from tests.support.tiny import Tensors

RECIPES = sorted((ROOT / "configs").glob("**/*.yaml"))
IMAGE_TOKEN = 95


# Tiny models


def image_and_text(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A prompt with an image of 2 x 2 patches."""
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 4, 6, 7]])
    return {"input_ids": ids, "pixel_values": pixels.to(dtype)}


def llama(**keys: Any) -> Any:
    return hf.LlamaConfig(**{**DECODER, "tie_word_embeddings": False, **keys})


def qwen3_sliding() -> Any:
    """Four layers, the last two of them with sliding windows."""
    return hf.Qwen3Config(
        **{**DECODER, "num_hidden_layers": 4}, head_dim=8, use_sliding_window=True,
        sliding_window=8, max_window_layers=2, tie_word_embeddings=True,
    )  # fmt: skip


def gemma3_sliding() -> Any:
    """Four layers, the third of them with full attention."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return hf.Gemma3TextConfig(
        **{**DECODER, "num_hidden_layers": 4}, head_dim=8, sliding_window=8, layer_types=kinds
    )


def gpt2(layers: int = 2) -> Any:
    return hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def bart() -> Any:
    return hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip


def t5() -> Any:
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    return hf.LlavaConfig(
        text_config=llama(), vision_config=vision, image_token_id=IMAGE_TOKEN, image_seq_length=4
    )


def qwen2_vl(layers: int = 2) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    return hf.Qwen2VLConfig(
        text_config={**DECODER, "num_hidden_layers": layers, "rope_scaling": rope},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
            "patch_size": 4,
        },
    )  # fmt: skip


def gemma2() -> Any:
    """Four layers, every other one with full attention."""
    return hf.Gemma2Config(**{**DECODER, "num_hidden_layers": 4}, head_dim=8, sliding_window=8)


def sparse_by_step() -> Any:
    """Four layers, every other one with experts."""
    return hf.Qwen2MoeConfig(
        **{**DECODER, "num_hidden_layers": 4}, **MOE, shared_expert_intermediate_size=16,
        decoder_sparse_step=2,
    )  # fmt: skip


ARCHITECTURES = {
    "llama": Architecture(llama),
    "llama_tied": Architecture(lambda: llama(tie_word_embeddings=True)),
    "mistral": Architecture(lambda: hf.MistralConfig(**DECODER, sliding_window=8)),
    "qwen2": Architecture(lambda: hf.Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "qwen3": Architecture(qwen3_sliding),
    "gemma": Architecture(lambda: hf.GemmaConfig(**DECODER, head_dim=8)),
    "gemma3": Architecture(gemma3_sliding),
    "gpt2": Architecture(gpt2),
    "gpt_neox": Architecture(
        lambda: hf.GPTNeoXConfig(**COMMON, bos_token_id=1, eos_token_id=2)
    ),
    "phi": Architecture(lambda: hf.PhiConfig(**DECODER)),
    "mixtral": Architecture(lambda: hf.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen2_moe": Architecture(
        lambda: hf.Qwen2MoeConfig(**DECODER, **MOE, shared_expert_intermediate_size=16)
    ),
    "bert": Architecture(lambda: hf.BertConfig(**COMMON), hf.AutoModel, generates=False),
    "t5": Architecture(t5, hf.AutoModelForSeq2SeqLM),
    "bart": Architecture(bart, hf.AutoModelForSeq2SeqLM),
    "llava": Architecture(llava, hf.AutoModelForImageTextToText, image_and_text),
    "qwen2_vl": Architecture(qwen2_vl, hf.AutoModelForImageTextToText),
}  # fmt: skip
LLAMA = ARCHITECTURES["llama"]


def mean(states: list[Tensors], dtype: torch.dtype) -> Tensors:
    """The mean in float64, rounded once."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(dtype)
        for name in states[0]
    }


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits(model: Any, architecture: Architecture) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = model(**architecture.prompt(model.dtype)).logits
    return scores


def assert_works(architecture: Architecture, model: Any) -> None:
    """It generates; or, where it is an encoder, its hidden states are finite."""
    prompt = architecture.prompt(model.dtype)
    with torch.no_grad():
        if not architecture.generates:
            assert model(**prompt).last_hidden_state.isfinite().all()
            return
        made = model.generate(
            **prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert len(made.logits) == 4
    assert all(scores.isfinite().all() for scores in made.logits)
    assert made.sequences.min() >= 0
    assert made.sequences.max() < VOCABULARY


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads, most of all where others want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Every architecture


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parents:
    return write_parents(tmp_path_factory.mktemp(request.param), ARCHITECTURES[request.param])


def test_soup_is_the_mean_of_its_parents_and_generates(parents: Parents, tmp_path: Path) -> None:
    model = parents.architecture.load(parents.merge(tmp_path / "out", "soup"))
    expected = mean([parents.state("a"), parents.state("b")], torch.bfloat16)
    assert_same(state_of(model), expected)
    assert_works(parents.architecture, model)


@pytest.mark.parametrize("method", ["ties", "dare", "slerp"])
def test_merge_loads_and_generates(parents: Parents, tmp_path: Path, method: str) -> None:
    model = parents.architecture.load(parents.merge(tmp_path / "out", method))
    found, base = state_of(model), parents.state("base")
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in base.items()}
    assert all(t.isfinite().all() for t in found.values())
    assert not any(torch.equal(t, base[name]) for name, t in found.items())
    assert_works(parents.architecture, model)


# Tied and untied heads


def tied(kind: str) -> Architecture:
    """An architecture whose config says that the head is the embedding."""
    given = ARCHITECTURES[kind]

    def config() -> Any:
        made = given.config()
        made.tie_word_embeddings = True
        return made

    return replace(given, config=config)


def untied_twin(folder: Path, architecture: Architecture, state: Tensors) -> Any:
    """The model of a folder, made in memory of other weights, with a head of its own."""
    config = hf.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    dtype = next(iter(state.values())).dtype
    model = architecture.auto.from_config(config, dtype=dtype)
    model.load_state_dict(state)
    return model.eval()


def untie(folder: Path, architecture: Architecture) -> None:
    """Give a tied model on disk a head of its own, as a fine-tune would."""
    model = untied_twin(folder, architecture, state_of(architecture.load(folder)))
    shutil.rmtree(folder)
    disturb(model, 7).save_pretrained(folder)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox", "mixtral", "llava", "qwen2_vl"]
)
def test_tied_base_and_untied_fine_tune_load_untied(kind: str, tmp_path: Path) -> None:
    architecture = tied(kind)
    parents = write_parents(tmp_path, architecture)
    untie(tmp_path / "a", architecture)
    recipe = {"merge_method": "soup", "base_model": "base", "models": ["base", "a"]}
    model = architecture.load(parents.merge(tmp_path / "out", recipe))
    assert model.config.tie_word_embeddings is False
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() != embedding.data_ptr()
    assert not torch.equal(head, embedding)
    expected = mean([parents.state("base"), parents.state("a")], torch.bfloat16)
    assert_same(state_of(model), expected)
    reference = untied_twin(tmp_path / "base", architecture, expected)
    assert torch.equal(logits(model, architecture), logits(reference, architecture))
    assert_works(architecture, model)


def test_task_arithmetic_with_tied_and_untied_sources(tmp_path: Path) -> None:
    """base + 0.5 (a - base) + 0.5 (b - base), where only `a` has a head of its own."""
    architecture = tied("llama")
    parents = write_parents(tmp_path, architecture, torch.float32)
    untie(tmp_path / "a", architecture)
    recipe = {**recipe_for("task_arithmetic"), "parameters": {"weight": 0.5}}
    model = architecture.load(parents.merge(tmp_path / "out", recipe))
    base, a, b = (parents.state(name) for name in ("base", "a", "b"))
    expected = {
        name: (0.5 * a[name].double() + 0.5 * b[name].double()).float() for name in base
    }  # the two halves of the base cancel
    assert model.config.tie_word_embeddings is False
    reference = untied_twin(tmp_path / "base", architecture, expected)
    torch.testing.assert_close(state_of(model), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model, architecture), logits(reference, architecture))


def test_untied_model_whose_config_is_silent_keeps_its_head(tmp_path: Path) -> None:
    """Llama is untied by default: a config that does not say so must not cost it its head."""
    parents = write_parents(tmp_path, LLAMA)
    for name in ("base", "a", "b"):
        change_config(tmp_path / name, "tie_word_embeddings")
    expected = mean([parents.state("a"), parents.state("b")], torch.bfloat16)
    assert not torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert_same(state_of(LLAMA.load(parents.merge(tmp_path / "out", "soup"))), expected)


def change_config(folder: Path, *dropped: str) -> None:
    """Leave keys out of config.json, as older releases did."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: v for key, v in config.items() if key not in dropped}))


# Other layouts of the same weights


def causal_mask() -> torch.Tensor:
    return torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.bfloat16))


OLD_BUFFERS: dict[str, dict[str, torch.Tensor]] = {
    "gpt2": {f"h.{layer}.attn.bias": causal_mask() for layer in range(2)},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": causal_mask().bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    },
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "bert": {"embeddings.position_ids": torch.arange(64)[None]},
    "llava": {"vision_tower.embeddings.position_ids": torch.arange(5)[None]},
}


def make_old(folder: Path, kind: str, buffers: bool) -> None:
    """Name and store tensors as old checkpoints do; GPT-2's lack a prefix on the Hub."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if kind == "gpt2":
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(tensors | (OLD_BUFFERS[kind] if buffers else {}), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", OLD_BUFFERS)
@pytest.mark.parametrize("holders", [("base", "a"), ("base",), ("a",)], ids="-".join)
def test_buffers_of_old_checkpoints_do_no_harm(
    kind: str, holders: tuple[str, ...], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[kind]
    parents = write_parents(tmp_path, architecture)
    expected = mean([parents.state("base"), parents.state("a")], torch.bfloat16)
    for name in ("base", "a"):
        make_old(tmp_path / name, kind, name in holders)
    recipe = {"merge_method": "soup", "base_model": "base", "models": ["base", "a"]}
    model = architecture.load(parents.merge(tmp_path / "out", recipe))
    assert_same(state_of(model), expected)
    assert_works(architecture, model)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "llava"])
def test_sharded_parents_make_a_sharded_merge_that_loads(kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[kind]
    parents = write_parents(tmp_path, architecture, max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    out = parents.merge(tmp_path / "out", "soup", shard_size=15_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    model = architecture.load(out)
    assert_same(state_of(model), mean([parents.state("a"), parents.state("b")], torch.bfloat16))
    assert_works(architecture, model)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "llava"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_merge_loads_in_the_dtype_of_the_recipe(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[kind]
    parents = write_parents(tmp_path, architecture)
    recipe = {**recipe_for("soup"), "dtype": str(dtype).removeprefix("torch.")}
    model = architecture.load(parents.merge(tmp_path / "out", recipe))
    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_same(state_of(model), mean([parents.state("a"), parents.state("b")], dtype))
    assert_works(architecture, model)


# Stacked layers


STACKED = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        {"sources": [{"model": "b", "layer_range": [1, 4]}]},
    ],
}
ORIGINS = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]


def four_layers(kind: str) -> Architecture:
    """An architecture with four layers in its language model."""
    given = ARCHITECTURES[kind]

    def config() -> Any:
        if kind == "gpt2":
            return gpt2(4)
        if kind == "qwen2_vl":
            return qwen2_vl(4)
        made = given.config().to_dict()
        return type(given.config())(**{**made, "num_hidden_layers": 4})

    return replace(given, config=config)


def stacked(states: Mapping[str, Tensors], stack: str, after: tuple[str, ...]) -> Tensors:
    """What STACKED makes of models in memory; `after`: what comes behind the layers, from b."""
    made: Tensors = {}
    for name, tensor in states["a"].items():
        if not name.startswith(f"{stack}."):
            made[name] = states["b"][name] if name.startswith(after) else tensor
    for number, (owner, layer) in enumerate(ORIGINS):
        at = f"{stack}.{layer}."
        for name, tensor in states[owner].items():
            if name.startswith(at):
                made[f"{stack}.{number}.{name.removeprefix(at)}"] = tensor
    return made


@pytest.mark.parametrize(
    ("kind", "stack", "after"),
    [
        ("llama", "model.layers", ("model.norm.", "lm_head.")),
        ("phi", "model.layers", ("model.final_layernorm.", "lm_head.")),
        ("gpt2", "transformer.h", ("transformer.ln_f.",)),
        ("gpt_neox", "gpt_neox.layers", ("gpt_neox.final_layer_norm.", "embed_out.", "lm_head.")),
        ("mixtral", "model.layers", ("model.norm.", "lm_head.")),
        ("qwen3", "model.layers", ("model.norm.",)),
        ("gemma3", "model.layers", ("model.norm.",)),
        ("qwen2_vl", "model.language_model.layers", ("model.language_model.norm.", "lm_head.")),
    ],
)
def test_stacked_layers_load_and_generate(
    kind: str, stack: str, after: tuple[str, ...], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[kind] if kind in ("qwen3", "gemma3") else four_layers(kind)
    parents = write_parents(tmp_path, architecture)
    out = parents.merge(tmp_path / "out", STACKED)
    model = architecture.load(out)
    assert model.config.get_text_config().num_hidden_layers == 6
    assert_works(architecture, model)
    assert_same(state_of(model), stacked({n: parents.state(n) for n in ("a", "b")}, stack, after))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_stacked_layers_keep_their_kind_of_attention(kind: str, tmp_path: Path) -> None:
    """Windows travel with their layers: beyond them, the logits are those of the same stack made
    in memory."""
    architecture = ARCHITECTURES[kind]
    config = architecture.config()
    kinds = [config.layer_types[layer] for _, layer in ORIGINS]
    parents = write_parents(tmp_path, architecture)
    model = architecture.load(parents.merge(tmp_path / "out", STACKED))
    assert model.config.layer_types == kinds
    made = type(config)(**{**config.to_dict(), "num_hidden_layers": 6, "layer_types": kinds})
    reference = architecture.auto.from_config(made, dtype=torch.bfloat16).eval()
    states = {name: parents.state(name) for name in ("a", "b")}
    reference.load_state_dict(stacked(states, "model.layers", ("model.norm.",)))
    ids = torch.randint(3, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)


# Layers 0, 1, 2, 0, 1, 2. What a config says by counting layers is not true of them, unless
# merge-cli rewrites it. To refuse is right, too; to write another model is not.
REPEATED = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": name, "layer_range": [0, 3]}]} for name in ("a", "b")],
}


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
def test_stacked_layers_of_a_config_without_layer_types(kind: str, tmp_path: Path) -> None:
    """Configs on the Hub are older than `layer_types`: transformers counts them out by position,
    and stacking must not give a layer another kind of attention."""
    architecture = ARCHITECTURES["qwen3"] if kind == "qwen3" else Architecture(gemma2)
    parents = write_parents(tmp_path, architecture)
    for name in ("base", "a", "b"):
        change_config(tmp_path / name, "layer_types")
    own = architecture.load(tmp_path / "a").config.layer_types
    assert own == architecture.config().layer_types
    try:
        out = parents.merge(tmp_path / "out", REPEATED)
    except (MismatchError, RecipeError):
        return
    assert architecture.load(out).config.layer_types == own[:3] * 2


@pytest.mark.parametrize("kind", ["decoder_sparse_step", "first_k_dense_replace"])
def test_stacked_layers_where_a_number_says_which_have_experts(kind: str, tmp_path: Path) -> None:
    architecture = Architecture(sparse_by_step if kind == "decoder_sparse_step" else deepseek)
    parents = write_parents(tmp_path, architecture)
    try:
        out = parents.merge(tmp_path / "out", REPEATED)
    except (MismatchError, RecipeError):
        return
    assert_works(architecture, architecture.load(out))


# The command line and the committed family


def test_what_the_command_line_writes_loads(tmp_path: Path) -> None:
    parents = write_parents(tmp_path, LLAMA)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for("ties")))
    done = cli("run", "--device", "cpu", recipe, tmp_path / "cli", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    model = LLAMA.load(tmp_path / "cli")
    assert_works(LLAMA, model)
    again = LLAMA.load(parents.merge(tmp_path / "api", "ties"))
    assert_same(state_of(model), state_of(again))


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=[str(path.relative_to(ROOT / "configs")) for path in RECIPES]
)
def test_every_example_runs_loads_writes_text_and_repeats(
    recipe: Path, zoo: Path, tmp_path: Path
) -> None:
    options = MergeOptions(device="cpu")
    out = merge_cli.merge(recipe, tmp_path / "out", options=options).path
    model = LLAMA.load(out)
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size
    prompt = tokenizer("Open the file and", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, do_sample=False,
            max_new_tokens=12, min_new_tokens=12,
        )  # fmt: skip
    assert tokenizer.decode(made[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    again = merge_cli.merge(out / "merge_recipe.yaml", tmp_path / "again", options=options).path
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()
