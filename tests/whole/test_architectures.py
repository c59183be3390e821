"""Forty-odd more architectures of transformers: a soup is the mean of its parents, and loads.

test_loads.py says more of fewer ones. Nothing in merge_cli knows any of these by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.support.architectures import (
    COMMON,
    DECODER,
    MOE,
    VOCABULARY,
    Architecture,
    deepseek,
    state_of,
    write_parents,
)

FOUR = {**DECODER, "num_hidden_layers": 4}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SSM: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
}  # fmt: skip
Make = Callable[[], Any]


def decoder(name: str, **more: Any) -> Make:
    return lambda: getattr(hf, f"{name}Config")(**{**DECODER, **more})


DECODERS: dict[str, Make] = {
    "cohere": decoder("Cohere"), "cohere2": decoder("Cohere2"), "ernie4_5": decoder("Ernie4_5"),
    "exaone4": decoder("Exaone4"), "glm": decoder("Glm", head_dim=8),
    "glm4": decoder("Glm4", head_dim=8), "granite": decoder("Granite"),
    "nemotron": decoder("Nemotron"), "olmo2": decoder("Olmo2"), "persimmon": decoder("Persimmon"),
    "phi3": decoder("Phi3"), "smollm3": decoder("SmolLM3"), "stablelm": decoder("StableLm"),
    "starcoder2": decoder("Starcoder2"),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "codegen": lambda: hf.CodeGenConfig(**GPT, rotary_dim=4),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
    "mpt": lambda: hf.MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32),
}  # fmt: skip
EXPERTS: dict[str, Make] = {
    "deepseek_v3": deepseek,
    "gpt_oss": decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "granitemoe": decoder("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    "llama4": decoder("Llama4Text", head_dim=8, num_local_experts=2, intermediate_size_mlp=64),
    "olmoe": decoder("Olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": decoder("Phimoe", num_local_experts=4),
    "qwen3_moe": decoder("Qwen3Moe", **MOE, head_dim=8),
}
RECURRENT: dict[str, Make] = {
    "bamba": decoder("Bamba", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                     attn_layer_indices=[1], mamba_chunk_size=8),
    "falcon_h1": decoder("FalconH1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                         mamba_d_state=8, mamba_chunk_size=8),
    "jamba": lambda: hf.JambaConfig(
        **FOUR, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    "mamba": lambda: hf.MambaConfig(**SSM),
    "mamba2": lambda: hf.Mamba2Config(**SSM, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "recurrent_gemma": decoder("RecurrentGemma", num_hidden_layers=3, lru_width=32,
                               attention_window_size=8, head_dim=8),
    "rwkv": lambda: hf.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}  # fmt: skip
ENCODERS: dict[str, Make] = {
    "deberta_v2": lambda: hf.DebertaV2Config(**COMMON),
    "electra": lambda: hf.ElectraConfig(**COMMON, embedding_size=32),
    "modernbert": lambda: hf.ModernBertConfig(**COMMON),
    "roberta": lambda: hf.RobertaConfig(**COMMON),
    "vit": lambda: hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=8),
}  # fmt: skip
OTHERS: dict[str, tuple[Make, Any]] = {
    "m2m_100": (lambda: hf.M2M100Config(**SEQ2SEQ, max_position_embeddings=64),
                hf.AutoModelForSeq2SeqLM),
    "mt5": (lambda: hf.MT5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1), hf.AutoModelForSeq2SeqLM),
    "pegasus": (lambda: hf.PegasusConfig(**SEQ2SEQ, max_position_embeddings=64),
                hf.AutoModelForSeq2SeqLM),
    "wav2vec2": (lambda: hf.Wav2Vec2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, conv_dim=[16, 16], conv_kernel=[4, 4], conv_stride=[2, 2],
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
        hf.AutoModelForCTC),
    "whisper": (lambda: hf.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        decoder_start_token_id=1), hf.AutoModelForSpeechSeq2Seq),
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[Make, Any]] = {
    **{name: (make, hf.AutoModelForCausalLM)
       for group in (DECODERS, EXPERTS, RECURRENT) for name, make in group.items()},
    **{name: (make, hf.AutoModel) for name, make in ENCODERS.items()},
    **OTHERS,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # of the models' own code
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_soup_is_the_mean_of_its_parents_and_loads(tmp_path: Path, name: str) -> None:
    architecture = Architecture(*ARCHITECTURES[name])
    parents = write_parents(tmp_path, architecture)
    found = state_of(architecture.load(parents.merge(tmp_path / "out", "soup")))
    states = [parents.state(parent) for parent in ("a", "b")]
    assert found.keys() == states[0].keys()
    for tensor, value in found.items():
        mean = (states[0][tensor].double() + states[1][tensor].double()) / 2
        if tensor.endswith(
            "e_score_correction_bias"
        ):  # loaded in bfloat16 before transformers 5.24
            torch.testing.assert_close(value.double(), mean, rtol=2**-7, atol=0)
        else:
            assert torch.equal(value, mean.to(value.dtype)), tensor
        # transformers keeps some in float32: a router's, a correction's, a state's.
        assert value.dtype == states[0][tensor].dtype, tensor
