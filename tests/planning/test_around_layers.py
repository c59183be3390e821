"""Which slice the tensors around the layers come from: names as transformers' classes have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_cli.planning.around_layers import comes_after_layers
from tests.support.tiny import merge

AFTER = {
    "model.layers": "model.norm lm_head score classifier model.last_layernorm v_head "
    "final_logits_bias",
    "backbone.layers": "backbone.norm_f lm_head",
    "transformer.h": "transformer.ln_f lm_head transformer.output_layer",
    "transformer.blocks": "transformer.norm_f",
    "h": "ln_f",
    "rwkv.blocks": "rwkv.ln_out head",
    "gpt_neox.layers": "gpt_neox.final_layer_norm embed_out",
    "transformer.encoder.layers": "transformer.encoder.final_layernorm transformer.output_layer",
    "language_model.model.layers": "language_model.lm_head language_model.model.norm",
    "bert.encoder.layer": "bert.pooler.dense cls.predictions.bias classifier qa_outputs",
    "distilbert.transformer.layer": "pre_classifier classifier vocab_transform vocab_layer_norm "
    "vocab_projector",
    "model.decoder.layers": "model.decoder.final_layer_norm model.decoder.project_out lm_head",
    "model.encoder.layers": "model.encoder.layer_norm",
    "esm.encoder.layer": "esm.encoder.emb_layer_norm_after lm_head.dense",
    "vision_model.encoder.layers": "vision_model.post_layernorm",
    "encoder.layer": "generator_predictions.LayerNorm discriminator_predictions.dense",
    "transformer.layer": "lm_loss transformer.layer_norm sequence_summary.summary logits_proj",
    "layers": "head.norm decoder norm",
}
BEFORE = {
    "model.layers": "model.embed_tokens projector.norm mtp.norm model.visual.merger.ln_q "
    "model.per_layer_projection_norm model.per_layer_model_projection model.rotary_emb.inv_freq "
    "model.embed_tokens_per_layer model.vision_tower.post_layernorm",
    "transformer.h": "transformer.wte transformer.wpe transformer.word_embeddings_layernorm",
    "bert.encoder.layer": "bert.embeddings.LayerNorm",
    "model.decoder.layers": "model.decoder.layernorm_embedding model.decoder.project_in "
    "model.decoder.embed_positions model.encoder.layer_norm",
    "vision_model.encoder.layers": "vision_model.pre_layrnorm",
    "esm.encoder.layer": "esm.embeddings.layer_norm",
    "encoder.block": "shared decoder.final_layer_norm",
    "decoder.layers": "decoder.weight",
    "vit.layers": "vit.cls_token",
}


def named(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{name}.weight", stack) for stack, names in table.items() for name in names.split()]


@pytest.mark.parametrize(("name", "stack"), named(AFTER))
def test_final_norms_and_heads_come_from_the_last_slice(name: str, stack: str) -> None:
    assert comes_after_layers(name, stack)


@pytest.mark.parametrize(("name", "stack"), named(BEFORE))
def test_inputs_and_other_modules_come_from_the_first_slice(name: str, stack: str) -> None:
    assert not comes_after_layers(name, stack)


def test_the_final_norm_of_lfm2_has_an_inputs_name() -> None:
    assert comes_after_layers("model.embedding_norm.weight", "model.layers")


def test_slices_of_mamba(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, state_size=4)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = MambaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights = {n: w + seed if n == "backbone.norm_f.weight" else w for n, w in weights.items()}
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: b, layer_range: [1, 3]}]\n"
    )
    merged = merge(recipe, tmp_path / "out")
    assert merged["backbone.norm_f.weight"].unique().tolist() == [2.0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
