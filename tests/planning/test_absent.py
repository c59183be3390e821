"""What a model may lack is copied or left out, with a line; anything else is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.errors import MismatchError
from merge_cli.planning.absent import in_short, is_beyond, mtp_key
from merge_cli.planning.plan import Plan
from tests.support.tiny import Tensors, llama_config, llama_tensors, write_model


def text(seed: int = 0, layers: int = 2) -> Tensors:
    return llama_tensors(torch.Generator().manual_seed(seed), layers=layers, tied=False)


def config(**more: Any) -> dict[str, Any]:
    return {**llama_config(layers=2, tied=False), **more}


def plan(
    folder: Path, base: Mapping[str, torch.Tensor], fine: Mapping[str, torch.Tensor],
    of_base: Mapping[str, Any], of_fine: Mapping[str, Any] | None = None, models: str = "x",
) -> Plan:  # fmt: skip
    write_model(folder / "b", base, of_base)
    for name in models:
        write_model(folder / name, fine, of_base if of_fine is None else of_fine)
    document = {"merge_method": "task_arithmetic", "base_model": "b", "models": list(models)}
    (folder / "r.yaml").write_text(yaml.safe_dump(document))
    return merge_cli.plan(folder / "r.yaml")


def copied(found: Plan) -> set[str]:
    return {task.name for task in found.tasks if task.action == "copy"}


MTP = ("mtp.fc.weight", "model.mtp.norm.weight", "model.mtp_layers.0.mlp.weight",
       "mtp_block.0.proj.weight")  # fmt: skip


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers", "use_mtp"])
@pytest.mark.parametrize("name", [*MTP, "model.layers.2.eh_proj.weight"])
def test_layers_for_several_tokens(tmp_path: Path, key: str, name: str) -> None:
    whole = {**text(), name: torch.ones(4)}
    about = config(**{key: True if key == "use_mtp" else 1})
    found = plan(tmp_path, whole, text(1), about, models="xy")
    assert copied(found) == {name}
    (line,) = [note for note in found.notes if name in note]
    assert line.startswith(f"{name}: copied from b, as x, y lack it")
    assert key in line
    # The other way round the reference lacks it: left out, and said.
    other = plan(tmp_path, text(1), whole, about)
    assert name not in {task.name for task in other.tasks}
    assert any(note.startswith(f"{name}: x has it, b does not: left out") for note in other.notes)


@pytest.mark.parametrize("name", [*MTP, "model.layers.2.eh_proj.weight", "model.extra.weight"])
def test_what_no_config_explains_is_an_error(tmp_path: Path, name: str) -> None:
    whole = {**text(), name: torch.ones(4)}
    for base, fine, words in [
        (whole, text(), f"{name}: missing from x; b has it"),
        (text(), whole, f"{name}: x has it, b does not"),
    ]:
        with pytest.raises(MismatchError) as raised:
            plan(tmp_path, base, fine, config(num_nextn_predict_layers=0))
        assert [str(problem) for problem in raised.value.problems] == [words]


def test_a_layer_of_the_model_itself_is_an_error(tmp_path: Path) -> None:
    part = {name: value for name, value in text().items() if "layers.1." not in name}
    with pytest.raises(MismatchError, match="layers.1.mlp.up_proj.weight: missing from x"):
        plan(tmp_path, text(), part, config(num_nextn_predict_layers=1))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("DeepseekV3ForCausalLM", "model.layers.61.eh_proj.weight"),
        ("Qwen3NextForCausalLM", "mtp.fc.weight"),
        ("BartForConditionalGeneration", "final_logits_bias"),
    ],
)
def test_what_a_class_of_transformers_says(tmp_path: Path, architecture: str, name: str) -> None:
    whole = {**text(), name: torch.ones(1, 4)}
    found = plan(tmp_path, whole, text(1), config(architectures=[architecture]))
    assert copied(found) == {name}
    assert any(f"{architecture} in transformers may be without it" in n for n in found.notes)


@pytest.mark.parametrize("architecture", ["NoSuchModel", "pipeline", "__doc__", "os.system", 5])
def test_classes_that_transformers_has_not(tmp_path: Path, architecture: Any) -> None:
    whole = {**text(), "mtp.fc.weight": torch.ones(4)}
    with pytest.raises(MismatchError, match="mtp.fc.weight: missing from x"):
        plan(tmp_path, whole, text(1), config(architectures=[architecture]))


def test_poolers_and_buffers_take_a_line_each(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in (0, 1)}
    extra |= {"bert.pooler.dense.weight": torch.ones(2, 2), "bert.pooler.dense.bias": torch.ones(2)}
    found = plan(tmp_path, {**text(), **extra}, text(1), config())
    assert copied(found) == extra.keys()
    assert sum("copied from b" in note for note in found.notes) == 2
    other = plan(tmp_path, text(1), {**text(), **extra}, config())
    assert sum("left out" in note for note in other.notes) == 2


def test_a_head_for_pairs_of_sentences(tmp_path: Path) -> None:
    """bert-base-uncased has one, its fine-tunes on words alone have none."""
    name = "cls.seq_relationship.weight"
    whole = {**text(), name: torch.ones(2)}
    assert copied(plan(tmp_path, whole, text(1), config())) == {name}
    assert not copied(plan(tmp_path, text(1), whole, config()))


SEEING = {"vision_config": {"depth": 2}, "text_config": llama_config(layers=2, tied=False)}
EYES = {
    "visual.blocks.0.mlp.weight": torch.ones(3, 3), "visual.merger.norm.weight": torch.ones(3),
    "img_projection.0.weight": torch.ones(3),
}  # fmt: skip


def test_a_part_that_a_text_model_has_not_by_its_own_names(tmp_path: Path) -> None:
    """Qwen2-VL calls its language model as Qwen2 does: no prefix has to be exchanged."""
    found = plan(tmp_path, {**text(), **EYES}, text(1), SEEING, config())
    assert copied(found) == EYES.keys()
    assert sum("a part that the config does not describe" in note for note in found.notes) == 1


def test_a_part_that_the_config_describes_is_missed(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="missing from x"):
        plan(tmp_path, {**text(), **EYES}, text(1), SEEING, SEEING)


def test_half_a_part_is_missed(tmp_path: Path) -> None:
    half = {**text(1), "visual.blocks.0.mlp.weight": torch.ones(3, 3)}
    with pytest.raises(MismatchError, match=r"visual\.merger\.norm\.weight: missing from x"):
        plan(tmp_path, {**text(), **EYES}, half, SEEING, config())


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", "layers.1.mlp.up_proj"])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_a_text_model_must_be_whole(tmp_path: Path, lost: str, prefix: str) -> None:
    """Whether prefixes are exchanged makes no difference."""
    whole = {name.replace("model.", prefix): value for name, value in text().items()}
    part = {name: value for name, value in text(1).items() if lost not in name}
    with pytest.raises(MismatchError, match="missing from x"):
        plan(tmp_path, {**whole, **EYES}, part, SEEING, config())


def test_names_in_short() -> None:
    assert in_short(["a.b"]) == "a.b"
    assert in_short(["mtp.fc.weight", "mtp.norm.weight"]) == "mtp.* (2 tensors)"
    assert in_short(["a.b", "c.d", "e"]) == "a.b and 2 more"


def test_what_a_config_says_of_layers() -> None:
    assert mtp_key({"text_config": {"mtp_num_hidden_layers": 2}}) == "mtp_num_hidden_layers: 2"
    assert mtp_key({"num_nextn_predict_layers": None, "unmtped": 3, "mtp": "x"}) == ""
    assert is_beyond("model.layers.2.w", {"num_hidden_layers": 2})
    assert not is_beyond("model.layers.1.w", {"num_hidden_layers": 2})
    assert not is_beyond("visual.blocks.5.w", {"num_hidden_layers": 2})
