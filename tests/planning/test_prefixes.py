"""A language model merged with the one inside a multimodal model, whatever their prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import merge_cli
from merge_cli.errors import MismatchError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.tiny import Tensors, llama_config, llama_tensors, read_model, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)
# How transformers and others have named the language model in models that see.
NAMES = [
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.", "lm_head.": "lm_head."},
    {"model.": "text.", "lm_head.": "output.lm_head."},
]


def text(seed: int) -> Tensors:
    return llama_tensors(torch.Generator().manual_seed(seed), layers=2, tied=False)


def seeing(own: Tensors, names: dict[str, str]) -> Tensors:
    found = {}
    for name, value in own.items():
        old = next(old for old in names if name.startswith(old))
        found[names[old] + name.removeprefix(old)] = value
    found["vision_tower.layers.0.mlp.up_proj.weight"] = torch.randn(12, 6)
    found["projector.linear.weight"] = torch.randn(16, 6)
    return found


def recipe(folder: Path, method: str, models: list[str], base: str | None = None) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "merge_method": method, **({"base_model": base} if base else {}),
        "models": [{"model": name} for name in models],
    }, sort_keys=False))  # fmt: skip
    return path


@pytest.mark.parametrize("names", NAMES[:2] + NAMES[3:])
def test_a_text_model_goes_into_its_place(tmp_path: Path, names: dict[str, str]) -> None:
    base, fine = text(0), text(1)
    whole = seeing(base, names)
    write_model(tmp_path / "vlm", whole, llama_config(layers=2, tied=False))
    write_model(tmp_path / "text", fine, llama_config(layers=2, tied=False))
    path = recipe(tmp_path, "task_arithmetic", ["text"], "vlm")
    plan = make_plan(load_recipe(path))
    assert any("its tensors are vlm's by prefix" in note for note in plan.notes)
    found = read_model(merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path)
    assert found.keys() == whole.keys()
    wanted = seeing(fine, names)
    for name, value in found.items():
        if name.startswith(("vision", "projector")):
            assert torch.equal(value, whole[name])
        else:
            torch.testing.assert_close(value, wanted[name])
    copied = {t.name for t in plan.tasks if t.action == "copy"}
    assert copied == {"vision_tower.layers.0.mlp.up_proj.weight", "projector.linear.weight"}


def test_two_whole_models_with_other_prefixes(tmp_path: Path) -> None:
    one, two = seeing(text(0), NAMES[0]), seeing(text(1), NAMES[1])
    write_model(tmp_path / "a", one, llama_config(layers=2, tied=False))
    write_model(tmp_path / "b", two, llama_config(layers=2, tied=False))
    path = recipe(tmp_path, "soup", ["a", "b"])
    found = read_model(merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path)
    assert found.keys() == one.keys()
    renamed = seeing(text(1), NAMES[0])
    for name in found:
        other = two[name] if name in two else renamed[name]
        torch.testing.assert_close(found[name], (one[name] + other) / 2)


def test_without_a_wrapper(tmp_path: Path) -> None:
    """A checkpoint that was saved from inside the wrapper: `layers.0...`."""
    own = {name: value for name, value in text(0).items() if name != "lm_head.weight"}
    write_model(tmp_path / "a", own, llama_config(layers=2))
    bare = {name.removeprefix("model."): value * 3 for name, value in own.items()}
    write_model(tmp_path / "b", bare, llama_config(layers=2))
    found = read_model(
        merge_cli.merge(recipe(tmp_path, "soup", ["a", "b"]), tmp_path / "out",
                        options=OPTIONS).path
    )  # fmt: skip
    for name, value in found.items():
        torch.testing.assert_close(value, own[name] * 2)
    turned = read_model(
        merge_cli.merge(recipe(tmp_path, "soup", ["b", "a"]), tmp_path / "turned",
                        options=OPTIONS).path
    )  # fmt: skip
    assert turned.keys() == bare.keys()


def test_two_places_are_ambiguous(tmp_path: Path) -> None:
    own = text(0)
    twins = {
        f"{side}.{name}": value.clone() for side in ("left", "right") for name, value in own.items()
    }
    write_model(tmp_path / "twins", twins, llama_config(layers=2, tied=False))
    write_model(tmp_path / "text", own, llama_config(layers=2, tied=False))
    with pytest.raises(MismatchError, match="fit twins's under 'left.model.' and 'right.model.'"):
        make_plan(load_recipe(recipe(tmp_path, "task_arithmetic", ["text"], "twins")))


@pytest.mark.parametrize(("one", "other"), [("", "model."), ("model.", ""), ("model.", "model.")])
def test_an_encoder_is_none_of_a_decoder(one: str, other: str, tmp_path: Path) -> None:
    """The decoder has everything that the encoder has; files of Bart have `model.` or not."""
    own = text(0)
    for folder, prefix in (("a", one), ("b", other)):
        tensors = {"encoder." + name.removeprefix("model."): value for name, value in own.items()}
        tensors |= {f"decoder{name[7:]}": value * 2 for name, value in tensors.items()}
        tensors["decoder.layers.0.cross.weight"] = torch.ones(2, 2)
        if folder == "a" and one == other:  # a name that the reference has not
            tensors["encoder.position_ids"] = torch.ones(3)
        write_model(tmp_path / folder, {prefix + name: v.clone() for name, v in tensors.items()},
                    llama_config(layers=2, tied=False))  # fmt: skip
    found = read_model(
        merge_cli.merge(recipe(tmp_path, "soup", ["b", "a"]), tmp_path / "out",
                        options=OPTIONS).path
    )  # fmt: skip
    name = "layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[f"{other}encoder.{name}"], own[f"model.{name}"])
    torch.testing.assert_close(found[f"{other}decoder.{name}"], own[f"model.{name}"] * 2)


def test_a_part_with_its_own_names_lacks_what_it_lacks(tmp_path: Path) -> None:
    """No prefix was exchanged: that a tensor is missing may be a mistake, and is told as before."""
    whole = text(0)
    part = {name: value for name, value in whole.items() if "layers.1.mlp" not in name}
    write_model(tmp_path / "a", whole, llama_config(layers=2, tied=False))
    write_model(tmp_path / "b", part, llama_config(layers=2, tied=False))
    with pytest.raises(MismatchError, match="missing from b; a has it"):
        make_plan(load_recipe(recipe(tmp_path, "soup", ["a", "b"])))
