"""adapter_config.json: what is understood is applied, everything else is refused by its name."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import MergeCliError
from merge_cli.lora.base_note import base_note
from merge_cli.lora.config import by_pattern, read_config

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def said(folder: Path, **fields: Any) -> str:
    """The error; empty where the config is understood."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**PLAIN, **fields}))
    try:
        read_config(path, "base+adapter")
    except MergeCliError as error:
        return str(error) if error.exit_code == 3 else f"exit code {error.exit_code}"
    return ""


REFUSED: dict[str, Any] = {
    "peft_type": "VERA", "init_lora_weights": "pissa", "alora_invocation_tokens": [1, 2],
    "use_qalora": True, "layer_replication": [[0, 2]], "trainable_token_indices": [1],
    "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1.0}, "monteclora_config": {"n": 1},
    "use_bdlora": {"nblocks": 2}, "megatron_config": {"x": 1}, "enable_lora": [True, False],
    "invented_scale": 2, "another": {"a": 1}, "third": "on", "fourth": [1],
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_changes_the_weights_is_refused_by_name(tmp_path: Path, field: str) -> None:
    error = said(tmp_path, **{field: REFUSED[field]})
    assert (field if field != "peft_type" else "of the kind VERA") in error
    assert "adapter_config.json" in error
    assert "PEFT" in error


INITS = ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "unheard-of", 3)


@pytest.mark.parametrize("init", INITS)
def test_an_initialisation_that_prepares_the_base(tmp_path: Path, init: Any) -> None:
    assert "init_lora_weights" in said(tmp_path, init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_does_not(tmp_path: Path, init: Any) -> None:
    # What PEFT leaves behind when it converts PiSSA or CorDA to plain LoRA.
    left = {"corda_config": {"corda_method": "ipm"}, "loftq_config": {}, "eva_config": None}
    assert said(tmp_path, init_lora_weights=init, **left) == ""


def test_every_field_of_the_installed_peft_is_understood_or_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    about = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in peft.LoraConfig(target_modules=["q_proj"]).to_dict().items()
    }
    assert said(tmp_path, **about) == ""
    known = {**PLAIN, **about}
    for key in known:
        assert said(tmp_path, **{key: known[key]}) == ""


def test_unknown_fields_may_be_empty(tmp_path: Path) -> None:
    assert said(tmp_path, new_field=None, other=False, third=[], fourth={}, fifth="") == ""


def test_every_problem_at_once(tmp_path: Path) -> None:
    error = said(tmp_path, use_qalora=True, invented=1, init_lora_weights="pissa")
    assert all(word in error for word in ("QALoRA", "invented", "PiSSA"))


WRONG: dict[str, list[Any]] = {
    "r": [None, 0, -1, "4", 2.5, True, 10**30], "lora_alpha": [None, "8", True, [1]],
    "rank_pattern": [[1], "x", {"a": "b"}, {"a": 0}, {"(": 2}],
    "alpha_pattern": [3, {"a": None}, {"(": 1}, {"a" * 200_000: 1}, {"*": 1}],
    "use_rslora": ["yes", 1], "fan_in_fan_out": [{}, "no"], "bias": [True, "some", []],
    "modules_to_save": ["embed_tokens", [1], {"a": 1}, ["("], [""]],
    "target_parameters": ["experts", [None]],
    "target_modules": [3, [1], {"a": 1}, "(", "a" * 200_000],
    "exclude_modules": [True, [None], {"a": 1}, "*"],
    "layers_to_transform": ["1", [0.5], [True], {"a": 1}], "layers_pattern": [3, [1], ["("], "("],
    "task_type": [3, []], "peft_type": [7, ["LORA"]],
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_values_of_the_wrong_kind(tmp_path: Path, field: str) -> None:
    for value in WRONG[field]:
        start = time.monotonic()
        assert "adapter_config.json" in said(tmp_path, **{field: value}), value
        assert time.monotonic() - start < 1


def test_layers_of_an_expression_are_refused_as_peft_does(tmp_path: Path) -> None:
    assert "an expression" in said(tmp_path, target_modules=".*q", layers_to_transform=[0])
    assert "an expression" in said(tmp_path, target_modules=".*q", layers_to_transform=0)
    assert said(tmp_path, target_modules=".*q", layers_to_transform=None) == ""
    assert said(tmp_path, target_modules=["q"], layers_to_transform=0, layers_pattern="h") == ""


def test_no_mapping_and_no_json(tmp_path: Path) -> None:
    for text in ("[]", "{", "null", '{"a": ' * 100):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(MergeCliError, match=r"adapter_config\.json"):
            read_config(tmp_path / "adapter_config.json", "base+adapter")


def test_patterns_are_the_ends_of_names() -> None:
    name = "model.layers.11.self_attn.q_proj"
    for pattern in ("q_proj", "self_attn.q_proj", name, r".*\.q_proj", r"layers\.\d+\.self_attn.*",
                    "layers.(10|11).self_attn.q_proj", r"^model.*q_proj"):  # fmt: skip
        assert by_pattern({"k_proj": 1, pattern: 2, "(q_proj)": 3}, name, 0) == 2, pattern
    for pattern in ("_proj", "q", "layers.1.self_attn.q_proj"):
        assert by_pattern({pattern: 2}, name, 0) == 0, pattern


def test_a_pattern_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_cli.system.patterns.MAX_SECONDS", 0.2)
    start = time.monotonic()
    for pattern in ("(a+)+b", "(a|aa)+b", "(.*a)*b"):
        with contextlib.suppress(MergeCliError):
            by_pattern({pattern: 1}, "a" * 300, 0)
    assert time.monotonic() - start < 3


def test_bases_are_compared_by_their_last_name() -> None:
    for named, base in (("org/m", "./m/"), (r"C:\models\m", "m"), ("", "m"), (3, "m")):
        assert base_note({"base_model_name_or_path": named}, base) == ""
    assert "'org/m'" in base_note({"base_model_name_or_path": "org/m"}, "org/m-chat")
