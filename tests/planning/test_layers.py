"""Where gradients are evaluated: the config counts the layers, names may have more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.planning.layers import main_stack, model_heights
from tests.support.tiny import Tensors, llama_config, llama_tensors, write_model


def weights(folder: Path, tensors: Tensors, config: dict[str, Any], value: Any) -> Any:
    """The weight of model x, by layer; and the plan's notes."""
    for name in "bx":
        write_model(folder / name, tensors, config)
    document = {
        "merge_method": "task_arithmetic", "base_model": "b",
        "models": [{"model": "x", "parameters": {"weight": value}}],
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(document))
    plan = merge_cli.plan(folder / "r.yaml")
    return {task.group: task.parameters["weight"][0] for task in plan.tasks}, plan.notes


def test_a_layer_behind_the_last_one(tmp_path: Path) -> None:
    config = {**llama_config(layers=3), "num_nextn_predict_layers": 1}
    own = llama_tensors(torch.Generator().manual_seed(0), layers=3)
    gradient = [0.0, 0.5, 1.0]
    found, notes = weights(tmp_path, own, config, gradient)
    assert [found[f"model.layers.{i}"] for i in range(3)] == gradient
    assert not any("behind the layers" in note for note in notes)
    own["model.layers.3.eh_proj.weight"] = torch.ones(4, 4)
    own["model.layers.4.eh_proj.weight"] = torch.ones(4, 4)
    found, notes = weights(tmp_path, own, config, gradient)
    assert [found[f"model.layers.{i}"] for i in range(5)] == [*gradient, 1.0, 1.0]
    (line,) = [note for note in notes if "behind the layers" in note]
    assert line.startswith("model.layers.3, model.layers.4: ")
    _, notes = weights(tmp_path, own, config, 0.5)  # without a gradient it makes no difference
    assert not any("behind the layers" in note for note in notes)


def test_every_stack_counts_for_itself(tmp_path: Path) -> None:
    own = {f"encoder.block.{i}.w.weight": torch.ones(2) for i in range(2)}
    own |= {f"decoder.block.{i}.w.weight": torch.ones(2) for i in range(5)}
    config = {"model_type": "t5", "is_encoder_decoder": True, "num_layers": 2,
              "num_decoder_layers": 5}  # fmt: skip
    found, _ = weights(tmp_path, own, config, [0.0, 1.0])
    assert [found[f"encoder.block.{i}"] for i in range(2)] == [0.0, 1.0]
    assert [found[f"decoder.block.{i}"] for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_one_layer_and_one_behind_it(tmp_path: Path) -> None:
    """A lone layer takes the last value, as in mergekit; so does what is behind it."""
    own = llama_tensors(torch.Generator().manual_seed(0), layers=2)
    found, _ = weights(tmp_path, own, llama_config(layers=1), [0.2, 0.8])
    assert (found["model.layers.0"], found["model.layers.1"]) == (0.8, 0.8)


@pytest.mark.parametrize(
    ("found", "config", "wanted"),
    [
        ({"model.layers": 4}, {"num_hidden_layers": 3}, {"model.layers": 3}),
        ({"model.layers": 3}, {"num_hidden_layers": 4}, {"model.layers": 3}),
        ({"model.layers": 3}, {}, {"model.layers": 3}),
        ({"visual.blocks": 9, "model.layers": 5}, {"text_config": {"num_hidden_layers": 4}},
         {"visual.blocks": 9, "model.layers": 4}),
        # One stack is what the config counts; of another one it says nothing.
        ({"a.layers": 9, "b.layers": 4}, {"num_hidden_layers": 4}, {"a.layers": 9, "b.layers": 4}),
        # Two stacks that are taller: nobody says which of them the config counts.
        ({"a.layers": 9, "b.layers": 5}, {"num_hidden_layers": 4}, {"a.layers": 9, "b.layers": 5}),
    ],
)  # fmt: skip
def test_the_heights_of_a_model(found: Any, config: Any, wanted: Any) -> None:
    assert model_heights(found, config) == wanted


def test_the_main_stack_may_have_more_than_the_config_says() -> None:
    names = [f"model.language_model.layers.{i}.w" for i in range(4)]
    names += [f"model.visual.blocks.{i}.w" for i in range(7)]
    config = {"text_config": {"num_hidden_layers": 3}}
    assert main_stack(names, config) == "model.language_model.layers"
