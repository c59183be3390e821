"""Windows of a training run: which checkpoints, with which weights, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import merge_cli
from merge_cli.errors import RecipeError, UsageError
from merge_cli.json_schema import recipe_schema
from merge_cli.recipe.schedule import checkpoint_weights
from merge_cli.recipe.schema import Recipe
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model

STEPS = (1000, 2000, 3000, 4000, 5000, 7000)
METHOD = "merge_method: checkpoint_average\n"
WINDOW = METHOD + 'checkpoints: {from: run, pattern: "step_{step}"}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of six checkpoints, and folders beside them that are none."""
    for step in STEPS:
        (tmp_path / "run" / f"step_{step}").mkdir(parents=True)
    for other in ("step_latest", "step_10-old", "logs", "xstep_9"):
        (tmp_path / "run" / other).mkdir()
    (tmp_path / "run" / "step_8000").write_text("a file")
    return tmp_path


def load(folder: Path, text: str) -> Recipe:
    return merge_cli.load_recipe(folder / "recipe.yaml", text=text)


def steps_of(recipe: Recipe) -> list[int]:
    return [int(spec.model.path.rpartition("_")[2]) for spec in recipe.models]


def window(text: str) -> str:
    return METHOD + f'checkpoints: {{from: run, pattern: "step_{{step}}", {text}}}\n'


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ("", STEPS),
        ("last: 2", STEPS[-2:]),
        ('steps: "1000..5000/2000"', (1000, 3000, 5000)),
        ('steps: "2000..4999"', (2000, 3000, 4000)),
        ('steps: "3000..3000"', (3000,)),
        ("steps: [1000, 7000]", (1000, 7000)),
    ],
)
def test_which_checkpoints(folder: Path, chosen: str, steps: tuple[int, ...]) -> None:
    recipe = load(folder, window(chosen))
    assert recipe.merge_method == "soup"
    assert steps_of(recipe) == [*steps]
    assert [spec.parameters["weight"].setting for spec in recipe.models] == [1.0] * len(steps)
    assert recipe.notes[0].startswith(f"{len(steps)} checkpoint")


def test_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-0100"):
        (tmp_path / name).mkdir()
    recipe = load(tmp_path, METHOD + "checkpoints: {from: .}\n")
    names = [spec.model.path for spec in recipe.models]
    assert names == ["./checkpoint-9", "./checkpoint-10", "./checkpoint-0100"]


def test_folders_inside_of_checkpoints(tmp_path: Path) -> None:
    for name in ("a/global_step1/hf", "a/global_step2/hf", "a/global_step3"):
        (tmp_path / name).mkdir(parents=True)
    text = METHOD + 'checkpoints: {from: ., pattern: "a/global_step{step}/hf"}\n'
    names = [spec.model.path for spec in load(tmp_path, text).models]
    assert names == ["./a/global_step1/hf", "./a/global_step2/hf"]


def test_a_list_of_models_on_the_hub(tmp_path: Path) -> None:
    text = METHOD + "checkpoints: [org/m@step1, org/m@step2]\nschedule: {weights: [1, 3]}\n"
    recipe = load(tmp_path, text)
    assert [str(spec.model) for spec in recipe.models] == ["org/m@step1", "org/m@step2"]
    assert "org/m@step2 75 %" in recipe.notes[0]


def test_uneven_steps_are_pointed_out(folder: Path) -> None:
    assert "1000 to 2000 apart" in load(folder, WINDOW + "schedule: cosine\n").notes[1]
    assert len(load(folder, WINDOW).notes) == 1


# What is refused, and what the message must name.
REFUSED = {
    METHOD: "needs `checkpoints`",
    METHOD + "models: [run/step_1000]\n": "needs `checkpoints`",
    WINDOW + "models: [run/step_1000]\n": "not both",
    "merge_method: soup\ncheckpoints: {from: run}\n": "belongs to checkpoint_average",
    "merge_method: soup\nmodels: [run/step_1000]\nschedule: linear\n": "belongs to",
    METHOD + "checkpoints: {last: 3}\n": "checkpoints.from: missing",
    METHOD + "checkpoints: {from: runs, last: 3}\n": "no such folder: 'runs'",
    METHOD + "checkpoints: {from: run}\n": "nothing in 'run' is called checkpoint-{step}",
    METHOD + "checkpoints: {from: run, patern: x}\n": "Did you mean 'pattern'?",
    METHOD + "checkpoints: {from: run, pattern: step}\n": "must contain {step} once",
    METHOD + 'checkpoints: {from: run, pattern: "{step}/{step}"}\n': "must contain {step} once",
    METHOD + 'checkpoints: {from: run, pattern: "{step}_{loss}"}\n': "no braces besides {step}",
    METHOD + 'checkpoints: {from: run, pattern: "*_{step}"}\n': "no wildcard",
    METHOD + 'checkpoints: {from: run, pattern: "../{step}"}\n': "inside the run's folder",
    METHOD + 'checkpoints: {from: run, pattern: "/{step}"}\n': "inside the run's folder",
    METHOD + "checkpoints: []\n": "at least one",
    METHOD + "checkpoints: [org/a, 3]\n": "must be text (got 3)",
    window("last: 7"): "only 6 checkpoints (asked for 7). There: 1000, 2000",
    window("last: 0"): "at least 1",
    window("last: 2, steps: [1000]"): "either steps or last",
    window('steps: "1000..9000/4000"'): "not there: 9000. There: 1000",
    window("steps: [1000, 1500, 2000]"): "not there: 1500",
    window("steps: [2000, 1000]"): "must be ascending",
    window("steps: [1000, 1000]"): "must be ascending",
    window("steps: [-1, 1000]"): "must be ascending, from 0",
    window("steps: []"): "must be",
    window('steps: "5000..1000"'): "empty range",
    window('steps: "1000..4000/2000"'): "does not reach 4000: 3000 is its last step",
    window('steps: "1000..4000/0"'): "stride of at least 1",
    window('steps: "5001..6999"'): "none is there",
    window("steps: 1000-4000"): "FIRST..LAST",
    window("steps: 3"): "FIRST..LAST",
    WINDOW + "schedule: minus_sqr\n": "Did you mean 'minus_sqrt'?",
    WINDOW + "schedule: ema\n": "{ema: 0.9}",
    WINDOW + "schedule: weights\n": "{weights: [1, 2, 3]}",
    WINDOW + "schedule: 3\n": "must be one of",
    WINDOW + "schedule: {}\n": "must be one of",
    WINDOW + "schedule: {ema: 0.9, weights: [1]}\n": "must be one of",
    WINDOW + "schedule: {ema: 1}\n": "between 0 and 1",
    WINDOW + "schedule: {ema: 0}\n": "between 0 and 1",
    WINDOW + "schedule: {emma: 0.9}\n": "Did you mean 'ema'?",
    WINDOW + "schedule: {weights: [1, 2]}\n": "2 weights for 6 checkpoints",
    WINDOW + "schedule: {weights: [1, a]}\n": "list of numbers",
    WINDOW + "schedule: {weights: []}\n": "list of numbers",
    WINDOW + "parameters: {weight: 0.5}\n": "the schedule gives the weights",
    WINDOW + "parameters: {density: 0.5, lamda: 1}\n": "no such parameter",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(folder, text)
    assert REFUSED[text] in str(caught.value)
    assert all(problem.line for problem in caught.value.problems)


def test_the_same_step_twice(folder: Path) -> None:
    (folder / "run" / "step_01000").mkdir()
    with pytest.raises(RecipeError, match="step_01000 and step_1000 are the same step"):
        load(folder, WINDOW)


def test_both_sections_are_looked_at_at_once(folder: Path) -> None:
    with pytest.raises(RecipeError, match="2 problems"):
        load(folder, window("last: 7") + "schedule: sqrt\n")


def test_weights_that_cancel(tmp_path: Path) -> None:
    run_of(tmp_path, 2)
    text = METHOD + "checkpoints: {from: .}\nschedule: {weights: [1, -1]}\n"
    with pytest.raises(RecipeError, match="sum to 0"):
        merge_cli.plan(load(tmp_path, text))


def test_a_search_has_nothing_to_find_in_it(tmp_path: Path) -> None:
    text = (
        "merge_method: evolutionary\nmodels: [org/a, org/b]\n"
        "search: {method: checkpoint_average, parameters: {weight: {min: 0, max: 1}}}\n"
        "objective: [{task: loss, data: x.jsonl}]\n"
    )
    with pytest.raises(RecipeError, match="'checkpoint_average' has no parameters to search"):
        load(tmp_path, text)


def test_the_schema_knows_it() -> None:
    schema = Draft202012Validator(recipe_schema())
    good = [window("last: 3"), window('steps: "1..9/2"') + "schedule: {ema: 0.9}\n"]
    good += [METHOD + "checkpoints: [org/a]\nschedule: {weights: [1]}\n"]
    assert all(schema.is_valid(yaml.safe_load(text)) for text in good)
    bad = [METHOD, WINDOW + "models: [a]\n", WINDOW + "schedule: ema\n", window("last: 0")]
    bad += [window("last: 1, steps: [1]"), "merge_method: soup\ncheckpoints: {from: run}\n"]
    assert not any(schema.is_valid(yaml.safe_load(text)) for text in bad)


# Weights, against the paper's formulas in float64: a decay w, and c_j = w_j - w_{j+1}.

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "minus_sqrt": lambda x: 1.0 - x**0.5,
}


def wsm(decay: Callable[[float], float], k: int) -> list[float]:
    """c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k, written out."""
    w = {i: decay(i / (k + 1)) for i in range(1, k + 1)}
    if k == 0:
        return [1.0]
    middle = [w[j] - w[j + 1] for j in range(1, k)]
    return [1.0 - w[1], *middle, w[k]]


@pytest.mark.parametrize("name", DECAYS)
@given(count=st.integers(1, 60))
def test_curves(name: str, count: int) -> None:
    weights = checkpoint_weights(name, count)
    assert weights == pytest.approx(wsm(DECAYS[name], count - 1), rel=1e-12, abs=1e-15)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-14)
    assert min(weights) > 0


@pytest.mark.parametrize("name", DECAYS)
def test_an_average_is_a_run_whose_steps_decayed(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(20, generator=generator, dtype=torch.float64)
    steps = [torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(7)]
    checkpoints = [start]
    for step in steps:
        checkpoints.append(checkpoints[-1] + step)
    decayed = start + sum(DECAYS[name](i / 8) * step for i, step in enumerate(steps, start=1))
    weights = checkpoint_weights(name, 8)
    average = sum(c * theta for c, theta in zip(weights, checkpoints, strict=True))
    torch.testing.assert_close(average, decayed, rtol=1e-12, atol=1e-12)


@given(count=st.integers(1, 40), decay=st.floats(0.01, 0.99))
def test_ema(count: int, decay: float) -> None:
    values = [math.sin(3.0 * i + 1) for i in range(count)]
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    weights = checkpoint_weights("ema", count, decay=decay)
    assert sum(c * v for c, v in zip(weights, values, strict=True)) == pytest.approx(average)


def test_what_has_no_weights() -> None:
    assert checkpoint_weights("constant", 3) == [1.0, 1.0, 1.0]
    for name, count, decay in (("sqrt", 3, None), ("ema", 3, None), ("linear", 3, 0.5)):
        with pytest.raises(UsageError):
            checkpoint_weights(name, count, decay=decay)
    with pytest.raises(UsageError):
        checkpoint_weights("ema", 3, decay=1.0)
    with pytest.raises(UsageError):
        checkpoint_weights("linear", 0)


# Merges.


def run_of(folder: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for i in range(count):
        tensors = {n: t.bfloat16() for n, t in llama_tensors(generator, layers=1).items()}
        root = write_model(folder / f"checkpoint-{i}", tensors, llama_config(layers=1))
        for other in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
            (root / other).write_text("{}")


@pytest.mark.parametrize(
    "schedule", ["constant", "cosine", "{ema: 0.7}", "{weights: [3, 0, 1, 2]}"]
)
def test_the_bytes_are_those_of_the_soup(tmp_path: Path, schedule: str) -> None:
    run_of(tmp_path, 4)
    text = METHOD + f"checkpoints: {{from: .}}\nschedule: {schedule}\n"
    recipe = load(tmp_path, text)
    merge_cli.merge(recipe, tmp_path / "window")
    models = [
        {"model": f"checkpoint-{i}", "parameters": {"weight": spec.parameters["weight"].setting}}
        for i, spec in enumerate(recipe.models)
    ]
    soup = yaml.safe_dump({"merge_method": "soup", "models": models})
    merge_cli.merge(load(tmp_path, soup), tmp_path / "soup")
    merge_cli.merge(tmp_path / "window" / "merge_recipe.yaml", tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("window", "soup", "again")]
    assert len({file.read_bytes() for file in files}) == 1
    resolved = yaml.safe_load((tmp_path / "window" / "merge_recipe.yaml").read_text())
    assert resolved["merge_method"] == "soup"
    assert len(resolved["models"]) == 4
    left = {path.name for path in (tmp_path / "window").iterdir()}
    assert not left & {"optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"}


def test_against_float64(tmp_path: Path) -> None:
    run_of(tmp_path, 5)
    text = METHOD + "checkpoints: {from: .}\nschedule: minus_sqrt\ndtype: float32\n"
    merge_cli.merge(load(tmp_path, text), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    sources = [read_model(tmp_path / f"checkpoint-{i}") for i in range(5)]
    weights = wsm(DECAYS["minus_sqrt"], 4)
    for name, tensor in merged.items():
        exact = sum(c * source[name].double() for c, source in zip(weights, sources, strict=True))
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-7)
