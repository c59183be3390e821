"""k + 1 bins against a naive oracle; the chunked head; penalties against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from merge_cli.dam.forward import HeadJob, LossSums, head_loss, logits_loss
from merge_cli.dam.losses import DistillationLoss, penalty
from merge_cli.dam.optimizers import CoefficientOptimizer, largest, rate_at
from merge_cli.recipe.training import Training
from tests.support.dam_tiny import check_a_student_outside_the_teachers_top, targets_of


def naive_kl(teacher: list[float], student: list[float], k: int, temperature: float) -> float:
    """T² KL over the teacher's top k and the rest, with loops."""
    p = [math.exp(x / temperature) for x in teacher]
    q = [math.exp(x / temperature) for x in student]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    total = sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in top)
    rest = [i for i in range(len(p)) if i not in top]
    if rest:
        a, b = sum(p[i] for i in rest), sum(q[i] for i in rest)
        total += a * (math.log(a) - math.log(b))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 29, 30, 64])
def test_kl_in_bins_is_the_naive_one(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    teacher = torch.randn(4, 30, generator=generator, dtype=torch.float64) * 3
    student = torch.randn(4, 30, generator=generator, dtype=torch.float64) * 3
    objective = DistillationLoss({"kl": 1.0}, temperature)
    found = objective.terms(student, targets_of(teacher, k, temperature))["kl"]
    for row, value in enumerate(found.tolist()):
        expected = naive_kl(teacher[row].tolist(), student[row].tolist(), k, temperature)
        assert value == pytest.approx(expected, rel=1e-10)
    same = objective.terms(teacher, targets_of(teacher, k, temperature))["kl"]
    assert same.abs().max() < 1e-12


def test_a_student_outside_the_teachers_top_is_not_perfect() -> None:
    check_a_student_outside_the_teachers_top()


def test_a_tiny_tail_is_not_noise() -> None:
    """In float32 log(1 - sum of q_k) would be log(0) here."""
    teacher = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[32.0, 0.0, 0.0, 0.0]], requires_grad=True)
    kl = DistillationLoss({"kl": 1.0, "reverse_kl": 1.0}).terms(
        student, targets_of(teacher, 1, 1.0)
    )
    total = kl["kl"].sum() + kl["reverse_kl"].sum()
    total.backward()
    assert math.isfinite(float(total.detach()))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_other_losses_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    student = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    targets = targets_of(teacher, 12, 1.0)
    names = ("kl", "reverse_kl", "mse", "entropy", "cross_entropy")
    found = DistillationLoss(dict.fromkeys(names, 1.0)).terms(student, targets)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    kl = torch.nn.functional.kl_div
    expected = {
        "kl": kl(q, p, log_target=True, reduction="none").sum(-1),
        "reverse_kl": kl(p, q, log_target=True, reduction="none").sum(-1),
        "mse": ((p - q) ** 2).mean(-1),
        "entropy": torch.distributions.Categorical(logits=student).entropy(),
        "cross_entropy": torch.nn.functional.cross_entropy(
            student, targets.labels, reduction="none"
        ),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_head_in_chunks_is_the_head(chunk: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(chunk)
    head = torch.nn.Linear(6, 20, bias=bias).double()
    hidden = torch.randn(9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    objective = DistillationLoss({"kl": 1.0, "cross_entropy": 0.5}, 2.0)
    job = HeadJob(targets_of(teacher, 4, 2.0), objective, lambda x: x.tanh() * 3, LossSums(), 2.5,
              chunk_bytes=4 * 20 * chunk)  # fmt: skip
    (head_loss(hidden, head, job) * 3).backward()
    ours = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    plain = HeadJob(job.targets, objective, lambda x: x, LossSums(), 2.5)
    (logits_loss(head(hidden).tanh() * 3, plain) * 3).backward()
    for mine, theirs in zip(ours, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert job.sums.read() == pytest.approx(plain.sums.read())


def test_no_logits_of_a_whole_batch_exist() -> None:
    """The largest tensor that the head makes is one chunk of logits."""
    vocabulary, tokens = 5000, 64
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = function(*args, **(kwargs or {}))
            for value in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(value, torch.Tensor):
                    sizes.append(value.numel())
            return found

    head = torch.nn.Linear(8, vocabulary, bias=False)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    targets = targets_of(torch.randn(tokens, vocabulary), 16, 2.0)
    job = HeadJob(
        targets,
        DistillationLoss({"kl": 1.0}, 2.0),
        lambda x: x,
        LossSums(),
        chunk_bytes=16 * vocabulary,
    )
    with Watch():
        head_loss(hidden, head, job).backward()
    assert max(sizes) <= 8 * vocabulary  # the weight's own gradient; logits are 4 tokens at a time


def test_penalties_are_their_definitions() -> None:
    c = torch.tensor([[1.0, 2.0], [2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    pairs = [(0, 1), (0, 2), (1, 2)]
    sines = [
        [math.sin(2 * math.atan2(float(c[j, e]), float(c[i, e]))) ** 2 for e in range(2)]
        for i, j in pairs
    ]
    masses = [[float(c[i, e] ** 2 + c[j, e] ** 2) for e in range(2)] for i, j in pairs]
    expected = {
        "cosine": sum(cosine(c[i], c[j]) for i, j in pairs) / 3,
        "l1": float(c.abs().mean()),
        "l2": float((c**2).mean()),
        "overlap": sum(map(sum, sines)) / 6,
        "weighted_overlap": sum(
            sum(s * m for s, m in zip(sine, mass, strict=True)) / sum(mass)
            for sine, mass in zip(sines, masses, strict=True)
        ) / 3,
    }  # fmt: skip
    for name, value in expected.items():
        terms, grad = penalty(c, {name: 2.0})
        assert terms[name] == pytest.approx(2 * value, rel=1e-9)
        for place in ((0, 0), (2, 1)):
            step = 1e-6
            ends = []
            for sign in (step, -step):
                moved = c.clone()
                moved[place] += sign
                ends.append(penalty(moved, {name: 2.0})[0][name])
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx(float(grad[place]), abs=1e-6)
    assert penalty(c, {}) == ({}, None)
    assert penalty(c[:1], {"cosine": 1.0}) == ({"cosine": 0.0}, None)


def test_adamw_is_torchs() -> None:
    training = Training(weight_decay=0.1)
    start = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone(), start.clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    optimizer = CoefficientOptimizer(training)
    for step in range(1, 6):
        grad = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(step))
        optimizer.move("w", [ours], [grad], 1e-2, step)
        theirs.grad = grad.clone()
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_mofo_moves_the_largest_momenta_of_each_source() -> None:
    optimizer = CoefficientOptimizer(Training(optimizer="mofo", mofo_fraction=0.3))
    parameter = torch.zeros(2, 1, 10)
    grad = torch.arange(1.0, 21.0).reshape(2, 1, 10)
    optimizer.move("w", [parameter], [grad], 1e-2, 1)
    moved = (parameter != 0).reshape(2, 10)
    assert moved.sum(1).tolist() == [3, 3]
    assert moved[:, -3:].all()
    assert float(largest(torch.ones(2, 1), 0.1).sum()) == 2  # at least one of each


def test_schedules() -> None:
    warm = Training(learning_rate=1.0, schedule="cosine", warmup=0.2)
    rates = [rate_at(warm, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rate_at(Training(learning_rate=0.5, schedule="constant"), 7, 10) == 0.5
    assert rate_at(Training(learning_rate=1.0, schedule="linear"), 5, 10) == pytest.approx(0.5)
