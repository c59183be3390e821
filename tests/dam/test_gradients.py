"""dL/dc = R(G * W): the student's gradients against autograd through the merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.dam.forward import Batch, Forward, LossSums
from merge_cli.dam.losses import DistillationLoss
from merge_cli.dam.student import Student
from merge_cli.planning.plan import Plan
from tests.support.dam_tiny import (
    config,
    plan_of,
    random_batch,
    student_of,
    write_experts,
    write_models,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OBJECTIVE = DistillationLoss({"kl": 1.0, "cross_entropy": 0.3, "entropy": 0.1, "mse": 0.01}, 2.0)


def stored(plan: Plan, name: str) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """A tensor of the base and of every source, in float64, read by safetensors itself."""
    from safetensors import safe_open

    def read(index: int) -> torch.Tensor:
        source = plan.sources[index]
        with safe_open(source.root / "model.safetensors", "pt") as file:
            key = name if name in file.keys() else "model.embed_tokens.weight"  # noqa: SIM118
            return file.get_tensor(key).double()

    base = read(plan.base) if plan.base is not None else None
    return base, [read(i) for i in plan.operands]


def merged_by_formula(
    plan: Plan, student: Student, raws: Mapping[str, list[torch.Tensor]], activation: str
) -> dict[str, torch.Tensor]:
    """W by the formula, with autograd through the parameters `raws` of every coefficient."""
    found = {}
    for name, seat in student.merged_parameters.items():
        own = student.coefficients[name]
        shape = tuple(seat.values.shape)
        base, sources = stored(plan, name)
        raw, *factors = raws.get(name, own.parameters)
        value = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
                 "softmax": lambda x: torch.softmax(x, 0)}[activation](raw)  # fmt: skip
        total = torch.zeros(shape, dtype=torch.float64)
        if student._form == "task_vector":
            assert base is not None
            total = total + base
            sources = [source - base for source in sources]
        for i, source in enumerate(sources):
            c = value[i].reshape(own.layout.stored)
            c = c.expand(shape)
            if factors:
                c = c + (factors[0][i] @ factors[1][i].T).reshape(shape)
            total = total + c * source
        found[seat.name] = total
    return found


def autograd_gradients(
    plan: Plan, student: Student, batches: list[Batch], activation: str
) -> dict[str, list[torch.Tensor]]:
    """Gradients of the parameters of coefficients by autograd through the whole model."""
    raws = {
        name: [p.detach().clone().requires_grad_() for p in student.coefficients[name].parameters]
        for name in student.trained
    }
    merged = merged_by_formula(plan, student, raws, activation)
    names = {id(p): n for n, p in student.net.named_parameters()}
    weights: dict[str, torch.Tensor] = {}
    for name, weight in merged.items():
        seat = student.merged_parameters[name]
        own = names[id(seat.parameter)]
        if not seat.index:
            weights[own] = weight
        else:  # a part of a stack
            weights.setdefault(own, torch.zeros(seat.parameter.shape, dtype=torch.float64))
            weights[own][seat.index] = weight
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        out = torch.func.functional_call(
            student.net, weights, (), {"input_ids": batch.ids, "attention_mask": batch.mask},
            tie_weights=True,
        )  # fmt: skip
        terms = OBJECTIVE.terms(out.logits[batch.counted], batch.targets)
        total = total + (OBJECTIVE.total(terms) * batch.targets.weights).sum()
    total.backward()
    return {name: [p.grad for p in own] for name, own in raws.items()}


def disturb(student: Student) -> None:
    """Away from the start, where all sources are alike and half of a correction is zero."""
    generator = torch.Generator().manual_seed(5)
    for name in student.trained:
        for p in student.coefficients[name].parameters:
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        student.coefficients[name].moved()
    student.write_all()


def assert_equal_gradients(plan: Plan, student: Student, batches: list[Batch], activation: str,
                           limit: float = 1e-12) -> None:  # fmt: skip
    expected = autograd_gradients(plan, student, batches, activation)
    forward = Forward(student.net, chunk_bytes=4 * 260 * 5)  # five tokens at a time
    assert forward.taken_apart
    for batch in batches:
        forward.loss(batch, OBJECTIVE, LossSums()).backward()
    assert all(seat.parameter.grad is None for seat in student.merged_parameters.values())
    for name, grads in expected.items():
        for ours, theirs in zip(student.coefficients[name].gradients(), grads, strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            assert float((ours - theirs).abs().max()) <= limit * scale, name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_models(folder, config("llama", tied=True), dtype=torch.float64)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_models(folder, config("qwen2", tied=False), dtype=torch.float64)
    return folder


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def experts(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_experts(folder, request.param, dtype=torch.float64)
    return folder


GRANULARITIES = ("tensor", "column", "row", "element", "low_rank")
ACTIVATIONS = ("none", "tanh", "sigmoid", "softmax")


@pytest.mark.parametrize("form", ["soup", "task_vector"])
@pytest.mark.parametrize("granularity", ["column", "low_rank"])
def test_gradients_of_stacked_experts_are_autograds(
    experts: Path, granularity: str, form: str
) -> None:
    plan = plan_of(experts, {"granularity": granularity, "form": form})
    student = student_of(plan)
    assert sum(bool(seat.index) for seat in student.merged_parameters.values()) == 2 * 4 * 3
    student.net.set_experts_implementation("eager")  # the grouped product has no float64
    disturb(student)
    batches = [random_batch(torch.Generator().manual_seed(i)) for i in range(2)]
    assert_equal_gradients(plan, student, batches, "none")
    student.close()


@pytest.mark.parametrize("form", ["soup", "task_vector"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_are_autograds(llama: Path, granularity: str, activation: str, form: str) -> None:
    plan = plan_of(llama, {"granularity": granularity, "activation": activation, "form": form})
    student = student_of(plan)
    disturb(student)
    batch = random_batch(torch.Generator().manual_seed(1))
    assert_equal_gradients(plan, student, [batch], activation)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_untied_heads_biases_checkpointing_and_micro_batches(
    qwen: Path, granularity: str, checkpointing: bool
) -> None:
    plan = plan_of(qwen, {"granularity": granularity, "checkpointing": checkpointing})
    student = student_of(plan)
    assert any(name.endswith("q_proj.bias") for name in student.trained)
    assert "lm_head.weight" in student.trained
    disturb(student)
    generator = torch.Generator().manual_seed(2)
    batches = [random_batch(generator), random_batch(generator, rows=2, length=7)]
    assert_equal_gradients(plan, student, batches, "none")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_other_families(tmp_path: Path, kind: str) -> None:
    """Weights stored input first, and logits that are capped after the head."""
    write_models(tmp_path, config(kind), dtype=torch.float64)
    plan = plan_of(tmp_path, {"granularity": "column", "activation": "softmax"})
    student = student_of(plan)
    disturb(student)
    batch = random_batch(torch.Generator().manual_seed(3))
    if kind == "gpt2":
        assert student.coefficients["transformer.h.0.mlp.c_fc.weight"].layout.kind == "row"
    assert_equal_gradients(plan, student, [batch], "softmax", 1e-11)


def test_finite_differences(tmp_path: Path) -> None:
    """With GPT-2, which computes in float64 throughout (Llama's norms are float32)."""
    write_models(tmp_path, config("gpt2"), dtype=torch.float64)
    plan = plan_of(tmp_path, {"granularity": "column", "activation": "tanh"})
    student = student_of(plan)
    disturb(student)
    batch = random_batch(torch.Generator().manual_seed(4))
    forward = Forward(student.net)
    forward.loss(batch, OBJECTIVE, LossSums()).backward()
    name = "transformer.h.0.mlp.c_fc.weight"
    own = student.coefficients[name]
    (grad,) = own.gradients()

    def loss_at(change: float) -> float:
        own.raw[1, 3, 0] += change
        own.moved()
        student.write_all()
        sums = LossSums()
        with torch.no_grad():
            forward.loss(batch, OBJECTIVE, sums)
        own.raw[1, 3, 0] -= change
        return sum(OBJECTIVE.weights[k] * v for k, v in sums.read().items())

    step = 1e-5
    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert slope == pytest.approx(float(grad[1, 3, 0]), rel=1e-6, abs=1e-10)


def test_fused_and_two_pass_steps_are_the_same(llama: Path) -> None:
    plan = plan_of(llama, {"granularity": "column", "optimizer": "mofo"})
    raws: list[dict[str, Any]] = []
    for fused in (True, False):
        student = student_of(plan)
        forward = Forward(student.net)
        generator = torch.Generator().manual_seed(6)
        for _ in range(3):
            first, last = random_batch(generator), random_batch(generator)
            forward.loss(first, OBJECTIVE, LossSums()).backward()
            loss = forward.loss(last, OBJECTIVE, LossSums())
            if fused:
                student.last_backward(loss, 1e-2)
            else:
                loss.backward()
                student.update(1e-2)
        raws.append({name: student.coefficients[name].raw.clone() for name in student.trained})
        merged = {
            name: seat.parameter.detach().clone()
            for name, seat in student.merged_parameters.items()
        }
        student.write_all()
        assert all(
            torch.equal(merged[n], s.parameter) for n, s in student.merged_parameters.items()
        )
    for name in raws[0]:
        assert torch.equal(raws[0][name], raws[1][name]), name


def test_no_weight_sized_tensor_lives_in_the_graph(llama: Path) -> None:
    """Beside the parameters themselves, and beyond the largest gradient one at a time."""
    plan = plan_of(llama, {"granularity": "column"})
    student = student_of(plan)
    forward = Forward(student.net)
    parameters = {
        seat.parameter.untyped_storage().data_ptr() for seat in student.merged_parameters.values()
    }
    shapes = {
        tuple(s.parameter.shape)
        for s in student.merged_parameters.values()
        if s.parameter.ndim == 2
    }
    foreign: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        own = tensor.untyped_storage().data_ptr() in parameters
        if not own and (tuple(tensor.shape) in shapes or tuple(tensor.shape)[::-1] in shapes):
            foreign.append(tuple(tensor.shape))
        return tensor

    batch = random_batch(torch.Generator().manual_seed(7), rows=2, length=11)
    alive: list[int] = []
    for seat in student.merged_parameters.values():
        seat.parameter.register_post_accumulate_grad_hook(
            lambda p: alive.append(
                sum(s.parameter.grad is not None for s in student.merged_parameters.values())
            )
        )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward.loss(batch, OBJECTIVE, LossSums())
    student.last_backward(loss, 1e-3)
    assert foreign == []
    assert len(alive) == len(student.merged_parameters)
    assert max(alive) == 0  # each was projected and dropped before the next one came


def test_sources_brought_ahead_change_nothing_but_when_they_come(llama: Path) -> None:
    """As for a GPU: the next tensor is copied before it is asked for, two are held at most."""
    from merge_cli.dam.sources import Prefetcher, Sources

    class Recorded:
        def __init__(self) -> None:
            self.started, self.finished = 0, 0

        def start(self, rows: torch.Tensor) -> torch.Tensor:
            self.started += 1
            return rows.clone()

        def finish(self, started: torch.Tensor) -> torch.Tensor:
            self.finished += 1
            return started

    plan = plan_of(llama, {"granularity": "column", "form": "task_vector"})
    found = []
    for copies in (None, Recorded()):
        student = student_of(plan)
        if copies is not None:  # on a device, sources wait as they are stored
            before = student.sources
            student.sources = Sources(
                before._tensors, before.residency, "cpu", torch.float64, with_base=True, most_wide=0
            )
            student.sources.ahead = Prefetcher(copies)
        forward = Forward(student.net)
        generator = torch.Generator().manual_seed(8)
        for step in range(2):
            loss = forward.loss(random_batch(generator), OBJECTIVE, LossSums())
            student.last_backward(loss, 1e-2)
            if copies is not None and step == 0:
                assert copies.started == 0  # the order is learned in the first pass
        found.append({name: student.coefficients[name].raw.clone() for name in student.trained})
    assert isinstance(copies, Recorded)
    tensors = len(student.trained)
    assert copies.started == 4 * tensors  # base and three sources of each, once in each pass
    assert copies.finished >= 4 * (tensors - 1)
    assert len(student.sources.ahead._started) == 2  # type: ignore[union-attr]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_gradients_are_clipped_together_and_overflow_moves_nothing(llama: Path) -> None:
    plan = plan_of(llama, {"granularity": "column", "regularize": {}})
    norms, moved = [], []
    for clip in (None, 1e-3):
        student = student_of(plan)
        forward = Forward(student.net)
        batch = random_batch(torch.Generator().manual_seed(9))
        forward.loss(batch, OBJECTIVE, LossSums()).backward()
        grads = [student.coefficients[name].gradients()[0].clone() for name in student.trained]
        norms.append(student.update(1e-2, clip))
        moments = [student.moments(name)[0][0] for name in student.trained]
        moved.append((grads, moments))
    whole = torch.cat([g.reshape(-1) for g in moved[0][0]]).norm()
    assert norms == [pytest.approx(float(whole))] * 2  # the norm before clipping
    for (grad, first), clipped in zip(zip(*moved[0], strict=True), moved[1][1], strict=True):
        torch.testing.assert_close(first, 0.1 * grad)
        torch.testing.assert_close(clipped, 0.1 * grad * (1e-3 / whole))

    before = {name: student.coefficients[name].raw.clone() for name in student.trained}
    forward.loss(batch, OBJECTIVE, LossSums()).backward()
    student.coefficients[student.trained[0]].value_grad.fill_(float("inf"))
    steps = student.steps
    assert student.update(1e-2) == float("inf")
    assert student.steps == steps
    assert all(torch.equal(before[name], student.coefficients[name].raw) for name in before)
    assert all(
        float(p.abs().max()) == 0 for name in before for p in student.coefficients[name].projections
    )


def test_equal_sources_have_nothing_to_learn(tmp_path: Path) -> None:
    """Three copies of one model: the soup is the teacher, and no gradient moves it."""
    write_models(tmp_path, config("gpt2"), dtype=torch.float64, change=0.0)
    plan = plan_of(tmp_path, {"granularity": "column"})
    student = student_of(plan)
    batch = random_batch(torch.Generator().manual_seed(10))
    forward = Forward(student.net)
    from dataclasses import replace

    from merge_cli.evaluation.teachers import kept_predictions

    with torch.no_grad():
        logits = student.net(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.counted]
    ids, logp, tail = kept_predictions(logits, 8, 2.0)
    batch = replace(batch, targets=replace(batch.targets, ids=ids, logp=logp, tail=tail))
    sums = LossSums()
    forward.loss(batch, DistillationLoss({"kl": 1.0}, 2.0), sums).backward()
    assert abs(sums.read()["kl"]) < 1e-12
    for name in student.trained:
        assert float(student.coefficients[name].value_grad.abs().max()) < 1e-12
