"""What tensors are called in a wrapped model: PEFT wraps the same modules, and is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.adapters.pair import Module, ModuleParameter
from merge_cli.adapters.wrapping import Wrapping, takes_factors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

# Names that end with one another: behind a dot, and in the middle of a word.
NAMES = ("norm", "input_norm", "a.norm", "b.a.norm", "proj", "a.proj", "b.a.proj", "b.up_proj")


def net() -> Any:
    """Modules of these names: norms, and linear layers with biases."""
    root = torch.nn.Module()
    for name in NAMES:
        parent = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        layer = torch.nn.LayerNorm(3) if "norm" in last else torch.nn.Linear(3, 3)
        parent.add_module(last, layer)
    return root


def modules() -> dict[str, Module]:
    both = frozenset(("weight", "bias"))
    known = {n: Module("leaf" if "norm" in n else "linear", both) for n in NAMES}
    return {"a": Module("inner"), "b": Module("inner"), "b.a": Module("inner"), **known}


LINEAR, NORMS = ([n for n in NAMES if ("norm" in n) is norm] for norm in (False, True))
AT_HAND = {f"{name}.{tensor}" for name in NAMES for tensor in ("weight", "bias")}


@given(
    st.lists(st.sampled_from(LINEAR), min_size=1, unique=True),
    st.lists(st.sampled_from(NORMS), unique=True),
)
@settings(deadline=None, max_examples=60)
def test_tensors_have_the_names_that_peft_loads(factored: list[str], saved: list[str]) -> None:
    wrapping = Wrapping(modules(), factored)
    saved = [name for name in saved if not wrapping.why_not_saved(name, AT_HAND)]
    config = peft.LoraConfig(r=1, target_modules=wrapping.targets(), modules_to_save=saved or None)
    model = peft.get_peft_model(net(), config)
    state = model.state_dict()
    wrapped = {name for name in NAMES if any(f".{name}.lora_A." in f".{key}" for key in state)}
    assert {n for n in NAMES if f"base_model.model.{n}.lora_A.default.weight" in state} == set(
        factored
    ), wrapped
    for name in LINEAR:
        key = wrapping.name_of(ModuleParameter(name, "bias", "linear"))
        assert f"base_model.model.{key}" in state
    replaced = {n for n in NAMES if f"base_model.model.{n}.original_module.weight" in state}
    assert {other for name in saved for other in wrapping.saved_with(name)} == replaced


def test_an_expression_is_written_only_where_names_are_not_enough() -> None:
    assert Wrapping(modules(), ["b.a.proj", "b.up_proj"]).targets() == ["b.a.proj", "b.up_proj"]
    assert Wrapping(modules(), LINEAR).targets() == LINEAR
    assert Wrapping(modules(), ["proj"]).targets() == "proj"
    assert Wrapping(modules(), ["a.proj", "proj"]).targets() == r"a\.proj|proj"


def test_a_module_whose_name_means_others_is_saved_with_them_or_not_at_all() -> None:
    wrapping = Wrapping(modules(), ["proj"])
    assert wrapping.saved_with("norm") == sorted(NORMS)
    assert wrapping.saved_with("input_norm") == ["input_norm"]
    assert not wrapping.why_not_saved("norm", AT_HAND)
    lacking = AT_HAND - {"b.a.norm.bias"}
    assert "needs b.a.norm.bias" in wrapping.why_not_saved("norm", lacking)
    inner = {**modules(), "x.prenorm": Module("inner")}
    assert "takes x.prenorm for it" in Wrapping(inner, ["proj"]).why_not_saved("norm", AT_HAND)
    assert "factors of a.proj" in Wrapping(modules(), ["a.proj"]).why_not_saved("a", AT_HAND)
    stacks = {**modules(), "mlp.experts": Module("leaf", frozenset(("up",)))}
    told = Wrapping(stacks, ["proj"], ["mlp.experts"]).why_not_saved("mlp.experts", AT_HAND)
    assert "cannot save" in told


class Net(torch.nn.Module):
    """What PEFT looks at of a model: the type that its config says."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=None)


def test_layers_that_compute_with_the_weight_alone_take_no_factors() -> None:
    """Of each kind of model that the installed PEFT refuses, and of no other."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    net = Net()
    for kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "llama", None):
        for layer in ("in_proj", "out_proj", "conv1d", "x_proj"):
            net.config.model_type = kind
            try:
                _check_lora_target_modules_mamba(peft.LoraConfig(), net, layer)
                taken = True
            except ValueError:
                taken = False
            assert takes_factors(f"layers.0.mixer.{layer}", kind) is taken


def test_what_is_written_so_is_loaded(tmp_path: Path) -> None:
    """An adapter by hand, with the names that `Wrapping` gives: all of it arrives."""
    from safetensors.torch import save_file

    wrapping = Wrapping(modules(), ["proj", "a.proj"])
    tensors = {
        wrapping.name_of(ModuleParameter(name, tensor, "linear")): torch.rand(3)
        for name in LINEAR
        for tensor in ("bias",)
    }
    for name in NORMS:
        tensors |= {f"{name}.weight": torch.rand(3), f"{name}.bias": torch.rand(3)}
    for name in ("proj", "a.proj"):
        tensors |= {f"{name}.lora_A.weight": torch.rand(1, 3)}
        tensors |= {f"{name}.lora_B.weight": torch.rand(3, 1)}
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()},
              tmp_path / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "bias": "all",
              "target_modules": wrapping.targets(), "modules_to_save": ["norm"]}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = peft.PeftModel.from_pretrained(net(), tmp_path).merge_and_unload().state_dict()
    for name in LINEAR:
        key = wrapping.name_of(ModuleParameter(name, "bias", "linear"))
        assert torch.equal(model[f"{name}.bias"], tensors[key]), name
    for name in NORMS:
        assert torch.equal(model[f"{name}.weight"], tensors[f"{name}.weight"]), name
