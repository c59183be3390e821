"""On-policy learning: what is sampled, how it is judged, and its gradient, in float64."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge_cli
from merge_cli.dam.data import Dataset
from merge_cli.dam.forward import Forward, LossSums
from merge_cli.dam.heldout import batch_of
from merge_cli.dam.panel import training_json
from merge_cli.dam.plan import plan_training
from merge_cli.dam.rollouts import OBJECTIVE, Prefix, Sampler, _inverse, prefix_of
from merge_cli.dam.student import Student
from merge_cli.dam.trainer import Trainer
from merge_cli.errors import Interrupted, RecipeError
from merge_cli.evaluation.forward import Example
from merge_cli.options import MergeOptions
from merge_cli.recipe.training import Rollouts
from tests.support.command import cli
from tests.support.dam_tiny import (
    config,
    plan_of,
    student_of,
    write_data,
    write_models,
    write_recipe,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = MergeOptions(device="cpu", threads=1)
QUICK: dict[str, Any] = {
    "max_steps": 4, "max_length": 24, "batch_size": 2, "learning_rate": 0.02, "top_k": 16,
    "evaluate_every": 2, "rollouts": {"length": 5, "prefix": 6},
}  # fmt: skip
VOCABULARY = 260


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_models(folder, config("llama"), dtype=torch.float64)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), names=("base", "a", "b", "c"), change=0.3)
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def example(first: int, count: int, seed: int) -> Example:
    chance = random.Random(seed)
    return Example(array("i", [chance.randrange(1, VOCABULARY) for _ in range(count)]), first)


DATASETS = [
    Dataset("a", 0, (example(1, 12, 0), example(4, 10, 1)), (), 2),
    Dataset("c", 2, (example(1, 12, 2), example(7, 12, 3)), (), 2),
]
ROWS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def sampler_of(student: Student, top_k: int | None, **about: Any) -> Sampler:
    rollouts = Rollouts(**{"length": 5, "prefix": 6, **about})
    return Sampler(
        student, DATASETS, rollouts, seed=3, top_k=top_k, batch_tokens=25, context=24
    )  # fmt: skip


def disturbed(folder: Path, **training: Any) -> Student:
    student = student_of(plan_of(folder, {"granularity": "column", **training}))
    generator = torch.Generator().manual_seed(5)
    for name in student.trained:
        raw = student.coefficients[name].raw
        raw += 0.1 * torch.randn(raw.shape, generator=generator, dtype=raw.dtype)
        student.coefficients[name].moved()
    student.write_all()
    return student


def logits_with(
    student: Student, weights: Mapping[str, torch.Tensor], ids: list[int]
) -> torch.Tensor:
    result: torch.Tensor = torch.func.functional_call(
        student.net, dict(weights), (), {"input_ids": torch.tensor([ids]), "use_cache": False},
        tie_weights=True,
    ).logits[0]  # fmt: skip
    return result


@pytest.mark.parametrize("top_k", [None, 7])
def test_loss_and_gradient_against_autograd(wide: Path, top_k: int | None) -> None:
    """Sum over data sets of the mean of KL(student || teacher) after every sampled prefix."""
    student = disturbed(wide)
    before = {n: p.detach().clone() for n, p in student.net.named_parameters()}
    items = sampler_of(student, top_k).items(0, ROWS, {0: 2, 1: 2})
    assert all(torch.equal(p, before[n]) for n, p in student.net.named_parameters())
    sums = LossSums(2)
    Forward(student.net).loss(batch_of(items), OBJECTIVE, sums).backward()

    sources = [load_file(wide / one / "model.safetensors") for one in "abc"]
    raws = {
        n: student.coefficients[n].raw.detach().clone().requires_grad_() for n in student.trained
    }
    weights = {
        name: torch.stack([
            raws[name][i].reshape(student.coefficients[name].layout.stored) * source[name]
            for i, source in enumerate(sources)
        ]).sum(0)
        for name in student.trained
    }  # fmt: skip
    expected: list[Any] = [0.0, 0.0]
    for item in items:
        ids = list(item.example.ids)
        teacher = sources[DATASETS[item.owner].source]
        log_p = logits_with(student, teacher, ids).log_softmax(-1)
        log_q = logits_with(student, weights, ids).log_softmax(-1)
        for place in range(item.example.first - 1, len(ids) - 1):
            p, q = log_p[place].detach(), log_q[place]
            if top_k is not None:  # bins: the teacher's likeliest tokens, and all others
                top = p.argsort(descending=True)[:top_k]
                rest = [i for i in range(VOCABULARY) if i not in set(top.tolist())]
                p = torch.cat([p[top], p[rest].exp().sum().log()[None]])
                q = torch.cat([q[top], q[rest].exp().sum().log()[None]])
            expected[item.owner] = expected[item.owner] + (q.exp() * (q - p)).sum() / (2 * 5)
    sum(expected).backward()
    for owner, found in enumerate(sums.by_owner()):
        assert found["reverse_kl"] == pytest.approx(float(expected[owner].detach()), rel=1e-9)
    for name in student.trained:
        (ours,) = student.coefficients[name].gradients()
        theirs = raws[name].grad
        assert theirs is not None
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) < 1e-10 * scale, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_sampled_is_what_a_loop_without_a_cache_samples(tmp_path: Path, kind: str) -> None:
    write_models(tmp_path, config(kind), dtype=torch.float64)
    student = student_of(plan_of(tmp_path, {}))
    sampler = sampler_of(student, None, temperature=0.7)
    prefixes = [Prefix(prefix_of(DATASETS[d].train[i], Rollouts(5, 6), 24), d, i) for d, i in ROWS]
    assert [len(prefix.ids) for prefix in prefixes] == [6, 4, 6, 7]
    found = sampler.sample(9, prefixes)
    for prefix, one in zip(prefixes, found, strict=True):
        chance = random.Random(f"3:rollouts:9:{prefix.owner}:{prefix.row}")
        ids = list(prefix.ids)
        for _ in range(5):
            with torch.no_grad():
                logits = student.net(input_ids=torch.tensor([ids])).logits[0, -1]
            draw, total, token = chance.random(), 0.0, -1
            probabilities = (logits / 0.7).softmax(-1).tolist()
            while total <= draw:
                token += 1
                total += probabilities[token]
            ids.append(token)
            if token == 0:  # the end of text
                break
        assert list(one.ids) == ids
        assert one.first == len(prefix.ids)
    again = sampler.sample(9, list(reversed(prefixes)))
    assert [list(one.ids) for one in reversed(again)] == [list(one.ids) for one in found]
    other = sampler.sample(10, prefixes)
    assert [list(one.ids) for one in other] != [list(one.ids) for one in found]


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    p = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3]], dtype=torch.float64).expand(1000, 5)
    draws = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    counts = torch.bincount(_inverse(p, draws), minlength=5)
    assert counts.tolist() == [0, 500, 200, 0, 300]
    least, most = torch.tensor([[0.0]]), torch.tensor([[1 - 1e-12]], dtype=torch.float64)
    assert int(_inverse(p[:1], least)) == 1
    assert int(_inverse(p[:1], most)) == 4


def test_a_continuation_ends_with_the_text(wide: Path) -> None:
    student = student_of(plan_of(wide, {}))
    head = student.net.get_output_embeddings()
    prefixes = [Prefix(array("i", [5, 6, 7]), 0, 0)]
    original = head.forward
    head.forward = lambda hidden: original(hidden) * 0 + torch.eye(VOCABULARY)[0] * 100
    (found,) = sampler_of(student, None).sample(0, prefixes)
    assert list(found.ids) == [5, 6, 7, 0]


def test_a_prompt_is_the_prefix_that_it_is() -> None:
    rollouts = Rollouts(length=5, prefix=6)
    assert len(prefix_of(example(9, 20, 0), rollouts, 24)) == 9
    assert len(prefix_of(example(1, 20, 0), rollouts, 24)) == 6
    assert len(prefix_of(example(1, 4, 0), rollouts, 24)) == 3
    assert len(prefix_of(example(22, 24, 0), rollouts, 24)) == 19  # room for five more


@pytest.mark.parametrize("dials", [{}, {"checkpointing": True, "mode": "two_pass"}])
def test_stopped_and_continued_is_the_same_bit_for_bit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dials: dict[str, Any]
) -> None:
    recipe = write_recipe(models, {**QUICK, **dials})
    whole = merge_cli.merge(recipe, tmp_path / "whole", options=OPTIONS)
    step = Trainer._step

    def interrupted(self: Trainer, number: int) -> dict[str, Any]:
        result = step(self, number)
        if number == 1:
            self._stopping = lambda: True
        return result

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(Interrupted, match="stopped after 2 steps"):
        merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS)
    monkeypatch.setattr(Trainer, "_step", step)
    result = merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS)
    ours, theirs = (
        (path / "coefficients.safetensors").read_bytes() for path in (result.path, whole.path)
    )
    assert ours == theirs
    history = result.report["training"]["history"]
    assert all(one["terms"][name]["rollouts"] > 0 for one in history for name in "abc")
    plain = merge_cli.merge(
        write_recipe(models, {**QUICK, "rollouts": None}), tmp_path / "plain", options=OPTIONS
    )
    assert (plain.path / "coefficients.safetensors").read_bytes() != theirs
    resolved = (result.path / "merge_recipe.yaml").read_text()
    assert "rollouts:" in resolved
    again = merge_cli.merge(
        result.path / "merge_recipe.yaml", tmp_path / "again", options=OPTIONS
    )  # fmt: skip
    assert (again.path / "model.safetensors").read_bytes() == (
        result.path / "model.safetensors"
    ).read_bytes()


def test_every_second_step(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(models, {**QUICK, "rollouts": {**QUICK["rollouts"], "every": 2}})
    report = merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS).report["training"]
    sampled = ["rollouts" in one["terms"]["a"] for one in report["history"]]
    assert sampled == [True, False, True, False]
    assert report["cost"]["passes"] == 4 + 2  # what was sampled has a backward pass of its own
    assert report["dials"]["rollouts"]["every"] == 2


def test_the_plan_says_what_it_costs(models: Path) -> None:
    decided = plan_training(plan_of(models, QUICK), "cpu")
    without = plan_training(plan_of(models, {**QUICK, "rollouts": None}), "cpu")
    assert decided.needs.rollouts == 6 * 5 * (12 * 16 + 4)
    assert decided.needs.on_host - without.needs.on_host == decided.needs.rollouts
    assert training_json(decided)["dials"]["rollouts"]["length"] == 5
    text = " ".join(cli("plan", write_recipe(models, QUICK)).stdout.split())
    assert "every step 6 rows are continued by up to 5 tokens, 120 in all" in text
    assert "4 rewrites" in text


@pytest.mark.parametrize(
    ("rollouts", "said"),
    [
        ({"length": 24}, "leave no room"),
        ({"lenght": 5}, "unknown key"),
        ({"weight": -1}, "at least 0"),
        ("often", "must be a mapping"),
    ],
)
def test_what_makes_no_sense_is_refused(models: Path, rollouts: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan_of(models, {**QUICK, "rollouts": rollouts})
