"""What training refuses before it begins, rather than publish nonsense or fail at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from merge_cli.dam.coefficients import Coefficients, layout_of
from merge_cli.dam.plan import plan_training
from merge_cli.data.sequences import short_names
from merge_cli.errors import RecipeError, ResourceError, SourceError
from merge_cli.evaluation.empty import empty_model
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.training import Training
from tests.support.dam_tiny import (
    config,
    llamas_with_data,
    plan_of,
    write_data,
    write_models,
    write_recipe,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llamas_with_data(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("preset", ["dam", "dam-reference"])
def test_one_source_does_not_start_beyond_tanh(models: Path, preset: str) -> None:
    training = {"preset": preset, "activation": "tanh", "start": "soup"}
    with pytest.raises(RecipeError, match="tanh does not reach 1"):
        plan_of(models, training, names=("a",))
    plan_of(models, {**training, "start": 0.9}, names=("a",))
    plan_of(models, {**training, "start": "raw_soup"}, names=("a",))


@pytest.mark.parametrize("again", ["a", "./a"])
def test_a_model_that_is_listed_twice_is_refused(models: Path, again: str) -> None:
    path = write_recipe(models)
    text = path.read_text().replace("model: b\n", f"model: {again}\n")
    path.write_text(text)
    with pytest.raises(RecipeError, match="listed twice"):
        make_plan(load_recipe(path))


def test_weights_may_be_written_as_yaml_reads_them(models: Path) -> None:
    """YAML 1.1 takes 1e-3 for text, and people write it."""
    path = write_recipe(models)
    section = "training: {loss: {kl: 1e0, entropy: 1e-3}, regularize: {cosine: 1e-2}}"
    path.write_text(path.read_text().replace("training:", f"{section}\nmetadata:"))
    training = load_recipe(path).training
    assert training is not None
    assert training.loss == {"kl": 1.0, "entropy": 0.001}
    assert training.regularize == {"cosine": 0.01}


def test_a_missing_tensorboard_is_told_by_the_plan(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_cli.dam.plan.find_spec", lambda name: None)
    plan = make_plan(load_recipe(write_recipe(models, {"tensorboard": True})))
    with pytest.raises(ResourceError, match="tensorboard is missing"):
        plan_training(plan)


def test_names_of_data_sets_differ() -> None:
    assert short_names(["x/a", "y/b/"]) == ["a", "b"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert short_names(["org/a@one", "org/a@two"]) == ["a@one", "a@two"]
    assert len(set(short_names(["x/a", "x/a", "x/a (2)"]))) == 3


@pytest.mark.parametrize(("activation", "start"), [("tanh", 1.0), ("sigmoid", 0.0)])
def test_a_start_that_no_parameter_has_is_never_zero_instead(activation: str, start: float) -> None:
    training = Training(activation=activation, start=start)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not reach"):
        Coefficients("w", layout_of((2, 3), "column"), 1, training, 0)


@pytest.mark.parametrize("error", [Exception("data did not match"), ValueError()])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("AutoTokenizer.from_pretrained", "tokenizer cannot be loaded"),
        ("AutoConfig.from_pretrained", "cannot read its config"),
        ("AutoModelForCausalLM.from_config", "no causal language model"),
    ],
)
def test_whatever_transformers_raises_is_said(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str, error: Exception
) -> None:
    def fail(*args: object, **more: object) -> None:
        raise error

    plan = plan_of(models)
    kind, _, method = name.partition(".")
    monkeypatch.setattr(getattr(transformers, kind), method, fail)
    with pytest.raises(SourceError, match=f"{what}.*: {str(error) or 'ValueError'}"):
        (plan_training if kind == "AutoTokenizer" else empty_model)(plan)


def test_dropout_is_off_whatever_its_name() -> None:
    from transformers import BertConfig, LlavaConfig

    from merge_cli.evaluation.empty import _drop_nothing

    config = LlavaConfig(text_config=BertConfig(hidden_dropout_prob=0.3))
    config.resid_pdrop = 0.2
    _drop_nothing(config)
    assert config.resid_pdrop == 0
    assert config.text_config.hidden_dropout_prob == 0
    assert config.text_config.attention_probs_dropout_prob == 0
    assert config.text_config.layer_norm_eps > 0


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan, too, opens configs and tokenizers with transformers, which offers to."""
    models = tmp_path / "models"
    models.mkdir()
    write_models(models, config("llama"))
    write_data(models)
    for name in ("base", "a", "b", "c"):
        file = models / name / "config.json"
        about = json.loads(file.read_text())
        about["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        about["model_type"] = "of_its_own"
        file.write_text(json.dumps(about))
        code = f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n"
        (models / name / "evil.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SourceError):
        plan_training(make_plan(load_recipe(write_recipe(models))), "cpu")
    assert not (tmp_path / "was-run").exists()
