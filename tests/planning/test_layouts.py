"""Sources that store the same weights otherwise: experts stacked or not, old and new names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.checkpoint.tensor_parts import JoinedTensor, TensorPart, cut
from merge_cli.checkpoint.tensors import read_numbers, reading
from merge_cli.errors import MismatchError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.tiny import Tensors, read_model, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)
TINY: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4, "attention_bias": True},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8,
                  "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
                    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8,
                    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                    "v_head_dim": 4},
}  # fmt: skip


def stir(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def write_kind(folder: Path, kind: str) -> None:
    """b, x and y, each one by one (`b1`) and stacked (`bn`), as transformers saves them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for seed, name in enumerate("bxy"):
        config = AutoConfig.for_model(kind, **TINY, **KINDS[kind])
        model = stir(AutoModelForCausalLM.from_config(config), seed)
        model.save_pretrained(folder / f"{name}1")
        try:
            model.save_pretrained(folder / f"{name}n", save_original_format=False)
        except TypeError:
            pytest.skip("this transformers stores experts one by one alone")


def merged(folder: Path, method: str, base: str, models: list[str], **keys: Any) -> Path:
    recipe = folder / f"{base}.yaml"
    document = {"merge_method": method, "base_model": base, "models": models, **keys}
    recipe.write_text(yaml.safe_dump(document))
    return merge_cli.merge(recipe, folder / f"{base} {''.join(models)}", options=OPTIONS).path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_either_layout(tmp_path: Path, kind: str) -> None:
    """The same bytes as from models that are stored alike."""
    write_kind(tmp_path, kind)
    for own, other in ("1n", "n1"):
        wanted = merged(tmp_path, "ties", f"b{own}", [f"x{own}", f"y{own}"])
        found = merged(tmp_path, "ties", f"b{own}", [f"x{other}", f"y{own}"])
        one, two = read_model(wanted), read_model(found)
        assert one.keys() == two.keys() == read_model(tmp_path / f"b{own}").keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        notes = make_plan(load_recipe(tmp_path / f"b{own}.yaml")).notes
        assert sum(f"x{other}: experts are stored" in note for note in notes) == 1
        assert len([note for note in notes if note.startswith(f"x{other}")]) <= 2


@pytest.mark.filterwarnings("ignore")
def test_both_layouts_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_kind(tmp_path, "mixtral")
    ids = torch.arange(12).reshape(1, 12)
    logits = [
        AutoModelForCausalLM.from_pretrained(merged(tmp_path, "task_arithmetic", *which))(
            ids
        ).logits
        for which in (("bn", ["x1", "y1"]), ("b1", ["xn", "yn"]))
    ]
    assert torch.equal(*logits)


def simple(names: list[str], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 4, generator=generator) for name in names}


OLD_AND_NEW = [
    ("bert.encoder.layer.0.output.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.weight"),
    ("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
    ("wav2vec2.encoder.pos_conv_embed.conv.weight_g",
     "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    ("vocoder.resblocks.0.convs1.1.weight_v",
     "vocoder.resblocks.0.convs1.1.parametrizations.weight.original1"),
    ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
]  # fmt: skip


@pytest.mark.parametrize("turn", [False, True])
def test_names_old_and_new(tmp_path: Path, turn: bool) -> None:
    old, new = (list(names) for names in zip(*OLD_AND_NEW, strict=True))
    if turn:
        old, new = new, old
    base, x = simple(old), simple(new, 1)
    write_model(tmp_path / "b", base)
    write_model(tmp_path / "x", x)
    found = read_model(merged(tmp_path, "task_arithmetic", "b", ["x"]))
    assert found.keys() == base.keys()
    for ours, theirs in zip(old, new, strict=True):
        torch.testing.assert_close(found[ours], x[theirs])
    notes = make_plan(load_recipe(tmp_path / "b.yaml")).notes
    assert sum("other names of the same tensors" in note for note in notes) == 1


def split(seed: int, experts: int = 3, names: tuple[str, ...] = ("w1", "w3", "w2")) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(zip(names, ((6, 4), (6, 4), (4, 6)), strict=True))
    return {
        f"model.layers.0.block_sparse_moe.experts.{n}.{name}.weight":
            torch.randn(shape, generator=generator)
        for n in range(experts) for name, shape in shapes.items()
    }  # fmt: skip


STACKS = {
    "model.layers.0.mlp.experts.gate_up_proj": torch.ones(3, 12, 4),
    "model.layers.0.mlp.experts.down_proj": torch.ones(3, 4, 6),
}


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"model.layers.0.block_sparse_moe.experts.{name}")


def reshape(tensors: Tensors) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"] = torch.ones(5, 4)


@pytest.mark.parametrize(
    "change", [without("1.w3.weight"), without("2.w2.weight"), reshape], ids=["up", "down", "shape"]
)
def test_experts_that_are_not_whole_are_told(tmp_path: Path, change: Any) -> None:
    tensors = split(0)
    change(tensors)
    write_model(tmp_path / "b", STACKS, {"model_type": "mixtral"})
    write_model(tmp_path / "x", tensors, {"model_type": "mixtral"})
    with pytest.raises(MismatchError, match="experts.gate_up_proj: missing from x"):
        merged(tmp_path, "task_arithmetic", "b", ["x"])


def test_another_number_of_experts_is_told(tmp_path: Path) -> None:
    write_model(tmp_path / "b", STACKS, {"model_type": "mixtral"})
    write_model(tmp_path / "x", split(0, experts=4), {"model_type": "mixtral"})
    with pytest.raises(MismatchError, match=r"the shapes differ: b \[3, 12, 4\], x \[4, 12, 4\]"):
        merged(tmp_path, "task_arithmetic", "b", ["x"])


def test_any_span_of_joined_tensors(tmp_path: Path) -> None:
    """Also of parts of other dtypes, and of parts of what is computed."""
    values = {"a": torch.randn(3, 4), "b": torch.randn(2, 4), "c": torch.randn(1, 4).bfloat16()}
    write_model(tmp_path / "m", values)
    tensors = open_source(ModelRef(str(tmp_path / "m")), tmp_path).tensors
    whole = torch.cat([value.float() for value in values.values()]).flatten()
    for names, kind in (("ab", "F32"), ("abc", "F32"), ("c", "BF16")):
        joined = JoinedTensor("j", (1, 4), [tensors[name] for name in names])
        expected = torch.cat([values[name].float() for name in names]).flatten()
        assert (joined.dtype, joined.size) == (kind, expected.numel())
        with reading() as read:
            for start in range(joined.size):
                for stop in range(start + 1, joined.size + 1):
                    found = torch.from_numpy(read_numbers(read, joined, start, stop - start))
                    assert torch.equal(found, expected[start:stop])
    joined = JoinedTensor("j", (6, 4), [tensors[name] for name in "abc"])
    part = cut(joined, "p", 5, (2, 5))
    assert isinstance(part, TensorPart)
    assert part.nbytes == 40
    with reading() as read:
        assert torch.equal(torch.from_numpy(read_numbers(read, part, 2, 7)), whole[7:14])
    stored = cut(tensors["a"], "p", 4, (2, 4))
    with reading() as read:
        assert torch.equal(torch.from_numpy(read_numbers(read, stored, 0, 8)), whole[4:12])
