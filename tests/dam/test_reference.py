"""`preset: dam-reference` against the run of DAM's authors, written naively in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_cli.dam.forward import Forward, LossSums
from merge_cli.dam.losses import DistillationLoss, penalty
from merge_cli.dam.plan import plan_training
from merge_cli.dam.student import Student
from merge_cli.recipe.training import contradictions
from merge_cli.recipe.training_presets import preset
from tests.support.dam_tiny import config, plan_of, random_batch, student_of, write_models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OBJECTIVE = DistillationLoss({"kl": 1.0}, 2.0)
NAME = "model.layers.0.mlp.up_proj.weight"
VOCABULARY = 260


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_models(folder, config("llama", tied=True), dtype=torch.float64)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def reference(folder: Path) -> Student:
    return student_of(plan_of(folder, {"preset": "dam-reference"}))


def naive_cosine(raw: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of sources of a·b / (|a| |b|), by loops."""
    found = []
    for i in range(len(raw)):
        for j in range(i + 1, len(raw)):
            a, b = raw[i].reshape(-1), raw[j].reshape(-1)
            found.append((a @ b) / (a.norm() * b.norm()))
    return torch.stack(found).mean()


def test_everything_starts_at_tanh_of_a_third(llama: Path) -> None:
    """What is trained and what is not: three sources add up to 0.9645 of their average."""
    student = reference(llama)
    for name, coefficients in student.coefficients.items():
        assert torch.equal(coefficients.raw, torch.full_like(coefficients.raw, 1 / 3)), name
        sources = [load_file(llama / one / "model.safetensors") for one in "abc"]
        expected = torch.zeros_like(sources[0][name])
        for source in sources:
            expected += math.tanh(1 / 3) * source[name]
        found = student.merged_parameters[name].parameter.detach()
        assert float((found - expected).abs().max()) < 1e-14 * float(expected.abs().max()), name
        mean = sum(source[name] for source in sources) / 3
        assert float((found / mean - 0.9645).abs().max()) < 1e-4, name


def test_the_cosine_is_of_the_parameters(llama: Path) -> None:
    student = reference(llama)
    generator = torch.Generator().manual_seed(1)
    for name in student.trained:
        raw = student.coefficients[name].raw
        raw += torch.randn(raw.shape, generator=generator, dtype=raw.dtype)
        student.coefficients[name].moved()
    leaves = {
        name: student.coefficients[name].raw.detach().clone().requires_grad_()
        for name in student.trained
    }
    total = torch.stack([0.01 * naive_cosine(leaf) for leaf in leaves.values()]).sum()
    total.backward()
    for name, leaf in leaves.items():
        (grad,) = student._gradients(name)  # no batch has passed: the penalty is all there is
        assert leaf.grad is not None
        torch.testing.assert_close(grad, leaf.grad, rtol=0, atol=1e-15)
    assert student.penalties_found["cosine"] == pytest.approx(float(total.detach()), rel=1e-12)

    # Of the coefficients, which tanh has bent, it would be another one.
    bent = penalty(student.coefficients[NAME].values, {"cosine": 0.01})[0]["cosine"]
    assert abs(bent - float(0.01 * naive_cosine(leaves[NAME].detach()))) > 1e-6


def test_a_step_is_clipped_and_moves_the_largest_momenta(llama: Path) -> None:
    """tanh, KL over the whole vocabulary at T = 2 (times T²), cosine, clip 1.0, MoFO 0.3, AdamW."""
    training = preset("dam-reference")
    student = reference(llama)
    batch = random_batch(torch.Generator().manual_seed(2), k=VOCABULARY)
    assert batch.targets.tail is None
    raws = {
        name: coefficients.raw.detach().clone().requires_grad_()
        for name, coefficients in student.coefficients.items()
    }
    sources = [load_file(llama / one / "model.safetensors") for one in "abc"]
    weights = {}
    for name, raw in raws.items():
        layout = student.coefficients[name].layout
        total = torch.zeros(layout.shape, dtype=torch.float64)
        for i, source in enumerate(sources):
            total = total + torch.tanh(raw[i]).reshape(layout.stored) * source[name]
        weights[name] = total
    logits = torch.func.functional_call(
        student.net, weights, (), {"input_ids": batch.ids, "attention_mask": batch.mask},
        tie_weights=True,
    ).logits[batch.counted]  # fmt: skip
    log_q = (logits / 2).log_softmax(-1)
    log_p = batch.targets.logp
    loss = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = 30 * loss  # so that there is something to clip
    loss = loss + torch.stack([0.01 * naive_cosine(raws[name]) for name in student.trained]).sum()
    loss.backward()

    forward = Forward(student.net)
    (30 * forward.loss(batch, OBJECTIVE, LossSums())).backward()
    norm = student.update(training.learning_rate, training.clip_norm)
    grads = {name: raws[name].grad for name in student.trained}
    expected = math.sqrt(sum(float((g * g).sum()) for g in grads.values() if g is not None))
    assert norm == pytest.approx(expected, rel=1e-12)
    assert norm > 1
    for name, grad in grads.items():
        assert grad is not None
        clipped = grad / norm
        for i in range(3):
            flat = clipped[i].reshape(-1)
            moving = flat.abs().argsort(descending=True)[: max(1, int(0.3 * len(flat)))]
            after = raws[name][i].detach().reshape(-1).clone()
            for place in moving.tolist():  # the first step of Adam: m = g, v = g²
                g = float(flat[place])
                after[place] -= 1e-3 * g / (abs(g) + 1e-8)
            found = student.coefficients[name].raw[i].reshape(-1)
            torch.testing.assert_close(found, after, rtol=0, atol=1e-12)


def test_what_is_trained_on_and_what_is_kept(llama: Path) -> None:
    decided = plan_training(plan_of(llama, {"preset": "dam-reference"}), "cpu")
    training = decided.training
    kinds = {target.name for target in decided.targets if target.trained}
    assert kinds
    assert all(name.endswith("_proj.weight") for name in kinds), "linear layers only"
    for dataset in decided.datasets:
        assert all(example.first == 1 for example in dataset.train), "prompts count"
    assert decided.kept.k is None
    assert decided.mode == "two_pass"
    assert (training.batch_size, training.examples, training.epochs) == (1, 1729, 1)
    assert (training.tokens, training.max_length, training.schedule) == (None, 2048, "constant")
    assert (training.keep, training.clip_norm, training.learning_rate) == ("last", 1.0, 1e-3)


def test_patience_waits_for_nothing_where_the_last_step_is_kept() -> None:
    from dataclasses import replace

    training = replace(preset("dam-reference"), patience=2)
    assert [option for option, _, _ in contradictions(training, 3)] == ["patience"]
