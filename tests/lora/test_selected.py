"""Which modules a config selects: PEFT's own function is asked about the same names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.errors import SourceError
from merge_cli.lora.selected import SelectedModules

peft = pytest.importorskip("peft")
tuners = pytest.importorskip("peft.tuners.tuners_utils")

WORDS = ("model", "layers", "h", "0", "1", "12", "attn", "q_proj", "v_proj", "lm_head", "q")
NAMES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
LISTS = st.lists(NAMES, max_size=3)
EXPRESSIONS = st.sampled_from([
    "q_proj", r".*\.q_proj", r".*layers\.(0|12)\..*(q|v)_proj", r"^(?!.*attn).*q_proj$", "model.*",
])  # fmt: skip


def expected(config: dict[str, Any], module: str) -> bool:
    result = tuners.check_target_module_exists(peft.LoraConfig(**config), module)
    return bool(result) and not isinstance(result, tuners._ExcludedModule)


@given(
    st.lists(NAMES, min_size=1, max_size=3),
    st.none() | LISTS | EXPRESSIONS,
    st.none() | st.integers(0, 2) | st.lists(st.integers(0, 12), max_size=3),
    st.booleans(),
    st.none() | st.lists(st.sampled_from(["attn", "lm_head", "layers.1", "q", "(h|q_proj)"])),
    st.lists(NAMES, min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=300)
def test_names_are_those_that_peft_takes(
    targets: list[str], excluded: Any, layers: Any, by_list: bool, saved: Any, modules: list[str]
) -> None:
    config: dict[str, Any] = {
        "target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved,
        "layers_to_transform": layers,
    }  # fmt: skip
    if by_list and layers not in (None, []):
        config["layers_pattern"] = ["layers", "h"]
    selected = SelectedModules(config)
    for module in (*modules, *targets, *(f"model.layers.1.{name}" for name in targets)):
        assert (not selected.why_not(module)) is expected(config, module), (config, module)


@given(EXPRESSIONS, st.lists(NAMES, min_size=8, max_size=8))
@settings(deadline=None)
def test_an_expression_means_whole_names(expression: str, modules: list[str]) -> None:
    config = {"target_modules": expression}
    for module in (*modules, "model.layers.0.q_proj"):
        assert (not SelectedModules(config).why_not(module)) is expected(config, module)


def test_the_reason_names_the_key() -> None:
    module = "model.layers.0.attn.q_proj"
    reasons: dict[str, dict[str, Any]] = {
        "target_modules": {"target_modules": ["v_proj"]},
        "exclude_modules": {"exclude_modules": ["q_proj"]},
        "layers_to_transform": {"layers_to_transform": [1]},
        "modules_to_save": {"modules_to_save": ["attn"]},
    }
    for key, config in reasons.items():
        assert SelectedModules({"target_modules": ["q_proj"], **config}).why_not(module).startswith(
            f"{key} in adapter_config.json"
        )  # fmt: skip


def test_all_linear_layers_are_neither_embedding_nor_head() -> None:
    selected = SelectedModules({"target_modules": "All-Linear"})
    assert not selected.why_not("model.layers.0.attn.q_proj")
    assert selected.why_not("model.embed_tokens", is_embedding=True)
    assert selected.why_not("lm_head")


def test_a_parameter_is_selected_by_its_own_list() -> None:
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    assert not SelectedModules(config).why_not("model.layers.0.mlp.gate")
    assert SelectedModules(config).why_not("model.layers.0.attn.gate")


def test_an_expression_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_cli.system.patterns.MAX_SECONDS", 0.2)
    selected = SelectedModules({"target_modules": "(a|aa)+(b|bb)+(.*a)*c"})
    with pytest.raises(SourceError, match="takes too long") as caught:
        any(selected.why_not(text) for text in ["a" * 3000 + "b" * 3000 + "c" * n for n in (0, 1)])
    assert "adapter_config.json" in str(caught.value)
