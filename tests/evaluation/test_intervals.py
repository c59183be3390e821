"""Standard errors and intervals: do they hold what they promise?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from merge_cli.errors import GateError, UsageError
from merge_cli.evaluation.gates import check_gates, read_gates, require
from merge_cli.evaluation.result import Evaluation, Metric, TaskResult
from merge_cli.evaluation.summary import difference, interval, resampled, standard_error
from merge_cli.evaluation.tasks.loss import LossTask


def metric(parts: object, weights: object = None, better: str = "lower") -> Metric:
    values = np.asarray(parts, float).tolist()
    sizes = [1.0] * len(values) if weights is None else np.asarray(weights, float).tolist()
    return Metric("loss", "nats per token", better, values, sizes)  # type: ignore[arg-type]


def test_an_accuracys_standard_error_is_the_familiar_one() -> None:
    hits = [1.0] * 30 + [0.0] * 70
    assert standard_error(metric(hits)) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert standard_error(metric([1.0])) is None


def test_the_bootstrap_and_the_delta_method_agree() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 200, 400)
    nats = tokens * generator.normal(2.0, 0.3, 400)
    one = metric(nats, tokens)
    error = standard_error(one)
    assert error is not None
    assert resampled(one, "x").std() == pytest.approx(error, rel=0.1)


def test_intervals_cover_the_truth() -> None:
    """Rows of unequal length whose loss depends on it, as in text: 95 % means 95 %."""
    generator = np.random.default_rng(7)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = generator.integers(10, 300, count)
        row = generator.normal(0, 0.5, count)  # a row is hard or easy for every model
        a = tokens * (2.5 + row - 0.001 * tokens + generator.normal(0, 0.1, count))
        b = tokens * (2.4 + row - 0.001 * tokens + generator.normal(0, 0.1, count))
        return tokens, a, b

    tokens, a, b = sample(2_000_000)
    truth, gap = a.sum() / tokens.sum(), (a.sum() - b.sum()) / tokens.sum()
    covered = paired = narrower = 0
    trials = 300
    for trial in range(trials):
        tokens, a, b = sample(120)
        one, other = metric(a, tokens), metric(b, tokens)
        whole = interval(resampled(one, f"task {trial}", draws=600))
        covered += whole.low <= truth <= whole.high
        both = difference(one, other, f"task {trial}")
        assert both is not None
        paired += both.low <= gap <= both.high
        narrower += both.high - both.low < (whole.high - whole.low) / 2
    # A count of 300 with p = 0.95 has a standard deviation of 3.8; percentile intervals of 120
    # skewed rows are a little short.
    assert 270 <= covered <= 296
    assert 270 <= paired <= 296
    assert narrower == trials, "pairing is what makes small differences visible"


def test_draws_depend_on_task_and_size_alone() -> None:
    one = metric([1, 2, 3, 4])
    assert (resampled(one, "a") == resampled(one, "a")).all()
    assert (resampled(one, "a") != resampled(one, "b")).any()
    assert (resampled(metric([2, 4, 6, 8]), "a") == 2 * resampled(one, "a")).all()


def test_unequal_numbers_of_examples_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="3 examples cannot be paired with 2"):
        difference(metric([1, 2, 3]), metric([1, 2]), "x")


def test_one_example_says_nothing_of_chance() -> None:
    assert difference(metric([1.0]), metric([2.0]), "x") is None


def test_a_perplexitys_error_is_that_of_e_to_the_loss() -> None:
    generator = np.random.default_rng(3)
    nats = generator.normal(2.0, 0.3, 200)
    loss = metric(nats)
    perplexity = Metric("perplexity", "per token", "lower", loss.parts, loss.weights, power=True)
    assert perplexity.value == pytest.approx(math.exp(loss.value))
    error = standard_error(perplexity)
    assert error is not None
    assert resampled(perplexity, "x").std() == pytest.approx(error, rel=0.1)


def evaluation(**values: float) -> Evaluation:
    tasks = {
        name: TaskResult(name, "loss", {"loss": metric([value, value + 0.2])}, [{}, {}])
        for name, value in values.items()
    }
    return Evaluation("m", "d", "cpu", "float32", tasks)


TASKS = [LossTask(name=name, data=name) for name in ("math", "ja.val")]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "met"),
    [("math<=1.1", True), ("math.loss<1.1", False), ("math.loss>=1.1", True), ("math>1.1", False),
     ("ja.val.loss < 3", True), ("ja.val<2", False)],
)  # fmt: skip
def test_gates_on_numbers(gate: str, met: bool) -> None:
    (read,) = read_gates([gate], [], TASKS)
    found = check_gates([read], evaluation(**{"math": 1.0, "ja.val": 2.0}), {})
    assert (not found) == met, found


@pytest.mark.parametrize(
    ("gate", "met"),
    [("base:math", True), ("base:ja.val.loss", False), ("base:ja.val+0.1", True),
     ("base:ja.val+0.09", False), ("base:ja.val+5%", True), ("out/base:math.loss", True)],
)  # fmt: skip
def test_gates_on_models(gate: str, met: bool) -> None:
    (read,) = read_gates([], [gate], TASKS)
    base = evaluation(**{"math": 1.0, "ja.val": 1.9})
    found = check_gates([read], evaluation(**{"math": 1.0, "ja.val": 2.0}), {read.reference: base})
    assert (not found) == met, found


def test_unmet_gates_are_all_told() -> None:
    with pytest.raises(GateError, match=r"2 quality gates are not met") as caught:
        require({"a": ["one"], "b": ["two"], "c": []})
    assert "a: one" in str(caught.value)
    assert caught.value.exit_code == 5
    require({"a": []})


@pytest.mark.parametrize(
    ("gate", "no_worse", "what"),
    [("math=1", "", "is not a gate"), ("math<=x", "", "is not a gate"),
     ("maths<=1", "", "Did you mean 'math'"), ("math.los<=1", "", "Did you mean 'loss'"),
     ("math<=nan", "", "is not a gate"),
     ("", "math.loss", "does not name a model"),
     ("", "base:math+-2%", "does not name a model"), ("", "base:mat.loss", "Did you mean 'math'")],
)  # fmt: skip
def test_gates_that_make_no_sense_are_refused_before_any_work(
    gate: str, no_worse: str, what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        read_gates([gate] if gate else [], [no_worse] if no_worse else [], TASKS)
