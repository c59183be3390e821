"""Importances by coefficient: against one example at a time through transformers, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import merge_cli
from merge_cli.dam.distributed import World
from merge_cli.dam.forward import Forward
from merge_cli.dam.importance import TOKENS, fisher_shares, has_importances
from merge_cli.dam.plan import TrainingPlan, plan_training
from merge_cli.errors import Interrupted, RecipeError
from merge_cli.options import MergeOptions
from tests.support.dam_tiny import (
    config,
    plan_of,
    student_of,
    write_data,
    write_models,
    write_recipe,
)

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def decided(tmp_path: Path) -> TrainingPlan:
    write_models(tmp_path, config())
    plan = plan_of(tmp_path, {"preset": "default", "max_length": 24, "examples": 6})
    return plan_training(plan, "cpu")


def naive(decided: TrainingPlan) -> list[dict[str, torch.Tensor]]:
    """For each source the mean over its examples of squared gradients, element by element."""
    found = []
    for dataset in sorted(decided.datasets, key=lambda dataset: dataset.source):
        source = decided.plan.sources[decided.plan.operands[dataset.source]]
        net = hf.AutoModelForCausalLM.from_pretrained(source.root).double()
        total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for example in dataset.train:
            ids = torch.tensor([list(example.ids)])
            logp = net(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logp.gather(-1, ids[0, 1:, None])[example.first - 1 :]
            net.zero_grad()
            picked.sum().backward()
            for name, parameter in net.named_parameters():
                total[name] += parameter.grad**2
        found.append({name: value / len(dataset.train) for name, value in total.items()})
    return found


def shares_of(decided: TrainingPlan, stopping: Any = lambda: False) -> dict[str, Any]:
    student = student_of(decided.plan)
    try:
        return fisher_shares(
            student,
            Forward(student.net),
            decided.datasets,
            World(),
            on_progress=lambda done, total, name: None,
            stopping=stopping,
        )
    finally:
        student.close()


def test_shares_are_those_of_summed_importances(decided: TrainingPlan) -> None:
    assert all(sum(len(e.ids) for e in d.train) < TOKENS for d in decided.datasets)
    shares, importances = shares_of(decided), naive(decided)
    # As many as there are parameters: a head that is tied is one with its embedding.
    elements = sum(value.numel() for value in importances[0].values())
    scale = [sum(float(v.sum()) for v in one.values()) / elements for one in importances]
    assert set(shares) == set(importances[0])
    for name, share in shares.items():
        dim = {1: (), 2: (1,) if name == EMBEDDING else (0,)}[importances[0][name].dim()]
        expected = torch.stack(
            [
                (one[name] / s).mean(dim, keepdim=True) if dim else one[name] / s
                for one, s in zip(importances, scale, strict=True)
            ]
        )
        expected = (expected + 1e-6) / (expected + 1e-6).sum(0)
        torch.testing.assert_close(share.reshape(expected.shape), expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(share.sum(0), torch.ones_like(share[0]))


def test_every_source_must_have_data(decided: TrainingPlan) -> None:
    assert has_importances(decided.datasets, 3)
    assert not has_importances(decided.datasets[:2], 3)


def test_it_can_be_stopped(decided: TrainingPlan) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Interrupted, match="importances"):
        shares_of(decided, lambda: next(answers))


@pytest.mark.parametrize("base", [True, False])
def test_a_training_begins_there(tmp_path: Path, base: bool) -> None:
    """Of both forms: shares sum to 1. Without a step, what is published is the start."""
    write_models(tmp_path, config())
    write_data(tmp_path)
    training = {
        "preset": "default", "start": "fisher", "learning_rate": 0.0, "max_steps": 1,
        "max_length": 24, "examples": 6,
    }  # fmt: skip
    recipe = write_recipe(tmp_path, training, base=base, dtype="float32")
    options = MergeOptions(device="cpu", threads=1)
    report = merge_cli.merge(recipe, tmp_path / "out", options=options).report["training"]
    static = report["held_out"]["fisher"] if "held_out" in report else report["scores"]["fisher"]
    assert static["mean_kl"] == pytest.approx(report["verdict"]["kl"], rel=1e-5)
    again = merge_cli.merge(recipe, tmp_path / "again", options=options)
    weights = "model.safetensors"
    assert (again.path / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_an_activation_does_not_reach_it(tmp_path: Path) -> None:
    write_models(tmp_path, config())
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, {"start": "fisher", "activation": "tanh"})
    with pytest.raises(RecipeError, match="does not reach every merge"):
        merge_cli.plan(recipe)
