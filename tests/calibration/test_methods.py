"""RegMean and Fisher merging against oracles that look at real tiny models the slow way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import oracles
from tests.support.dam_tiny import config, write_data, write_models
from tests.support.statistics_tiny import (
    NAMES,
    cache,
    examples_of,
    merged,
    slow_grams,
    slow_importances,
    slow_net,
    write_recipe,
)

__all__ = ["cache"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("cache"),
]
KINDS = {"llama": False, "gpt2": True, "gemma2": True}  # kind -> whether its head is tied


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base and sources a, b, c with their data."""
    of = config(request.param, tied=KINDS[request.param])
    write_models(tmp_path, of, change=0.2)
    write_data(tmp_path)
    return tmp_path


def weights(folder: Path) -> list[dict[str, np.ndarray]]:
    files = [load_file(folder / name / "model.safetensors") for name in NAMES]
    return [{name: x.double().numpy() for name, x in file.items()} for file in files]


def close(found: torch.Tensor, wanted: np.ndarray, room: float) -> None:
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=room * scale)


@pytest.mark.parametrize(("alpha", "rows"), [(0.1, 5), (0.9, 1 << 20)])
def test_regmean(models: Path, alpha: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_cli.methods.regmean._CHUNK", 16 * rows)
    recipe = write_recipe(models, "regmean", weight=3.0, parameters={"alpha": alpha})
    examples = examples_of(recipe)
    nets = [slow_net(models / name) for name in NAMES]
    grams = [slow_grams(net, own) for net, own in zip(nets, examples, strict=True)]
    tied = "lm_head" if nets[0].config.tie_word_embeddings else ""
    regressed = 0
    for name, found in merged(recipe, models / "out").items():
        both = [one[name] for one in weights(models)]
        module = name.removesuffix(".weight")
        if module == tied or module not in grams[0] or name.endswith("bias"):
            close(found, (both[0] + 3 * both[1]) / 4, 1e-6)
            continue
        regressed += 1
        turned = [x.T for x in both] if "gpt2" in nets[0].config.model_type else both
        own = [one[module] for one in grams]
        wanted = oracles.regmean(turned, own, alpha, [1.0, 3.0])
        close(found, wanted.T if turned is not both else wanted, 2e-4)
    assert regressed == (8 if "gpt2" in nets[0].config.model_type else 14) + (not tied)


@pytest.mark.parametrize("normalize", ["l2", "sum", "none"])
def test_fisher(models: Path, normalize: str) -> None:
    settings = {"normalize": normalize, "epsilon": 1e-4}
    recipe = write_recipe(models, "fisher", parameters=settings)
    examples = examples_of(recipe)
    found = merged(recipe, models / "out")
    own = [
        slow_importances(slow_net(models / name), one)
        for name, one in zip(NAMES, examples, strict=True)
    ]
    stored = weights(models)
    assert found.keys() == own[0].keys()
    flat = [np.concatenate([one[name].reshape(-1) for name in found]) for one in own]
    sizes = {
        "l2": [np.sqrt(np.square(x).mean()) for x in flat],
        "sum": [x.mean() for x in flat],
        "none": [np.mean([x.mean() for x in flat])] * 2,
    }[normalize]
    for name, tensor in found.items():
        importances = [one[name] / size for one, size in zip(own, sizes, strict=True)]
        wanted = oracles.fisher([one[name] for one in stored], importances, [1, 1], 1e-4)
        close(tensor, wanted, 1e-3)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_equal_models_stay_what_they_are(models: Path, method: str) -> None:
    """To the bit, whatever they are weighted with."""
    shutil.copyfile(models / "a" / "model.safetensors", models / "b" / "model.safetensors")
    recipe = write_recipe(models, method, weight=0.3)
    own = load_file(models / "a" / "model.safetensors")
    for name, tensor in merged(recipe, models / "out").items():
        assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_the_order_of_sources_does_not_matter(models: Path, method: str) -> None:
    """Up to rounding: the mean is taken from the first one on."""
    one = merged(write_recipe(models, method, names=("a", "b", "c")), models / "one")
    two = merged(write_recipe(models, method, names=("c", "b", "a")), models / "two")
    for name in one:
        close(one[name], two[name].double().numpy(), 2e-6)


def test_plain_regression_is_least_squares(tmp_path: Path) -> None:
    """alpha = 1 minimises sum of ||X_i W^T - X_i W_i^T||^2 / tokens: numpy's own solver agrees."""
    write_models(tmp_path, config("llama"), change=0.2)
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, "regmean", parameters={"alpha": 1.0},
                          statistics={"examples": 24})  # fmt: skip
    found = merged(recipe, tmp_path / "out")
    caught: list[list[np.ndarray]] = []
    module = "model.layers.1.mlp.down_proj"
    for name, examples in zip(NAMES, examples_of(recipe), strict=True):
        net = slow_net(tmp_path / name)
        rows: list[np.ndarray] = []
        net.get_submodule(module).register_forward_hook(
            lambda _m, args, _r, rows=rows: rows.extend(args[0][0].numpy())
        )
        with torch.no_grad():
            for ids, _ in examples:
                net(torch.tensor([ids]))
        caught.append(rows)
    scaled = [np.array(rows) / np.sqrt(len(rows)) for rows in caught]
    both = [one[f"{module}.weight"] for one in weights(tmp_path)]
    seen = np.concatenate(scaled)
    wanted = np.concatenate([x @ w.T for x, w in zip(scaled, both, strict=True)])
    best = np.linalg.lstsq(seen, wanted, rcond=None)[0].T
    ours = found[f"{module}.weight"].double().numpy()

    def missed(w: np.ndarray) -> float:
        return float(np.square(seen @ w.T - wanted).sum())

    assert missed(ours) <= missed(best) * (1 + 1e-5)
    assert missed(ours) < missed(np.mean(both, axis=0))


def test_an_input_that_is_never_there_keeps_the_mean(tmp_path: Path) -> None:
    """A channel whose norm has the weight 0 gives rows of zeros: no inverse, and no NaN."""
    write_models(tmp_path, config("llama"), change=0.2)
    write_data(tmp_path)
    for name in NAMES:
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.input_layernorm.weight"][[2, 5]] = 0.0
        save_file(tensors, file, metadata={"format": "pt"})
    name = "model.layers.0.self_attn.q_proj.weight"
    both = [one[name] for one in weights(tmp_path)]
    for alpha in (0.9, 1.0):
        recipe = write_recipe(tmp_path, "regmean", parameters={"alpha": alpha})
        found = merged(recipe, tmp_path / f"out{alpha}")[name]
        mean = (both[0] + both[1]) / 2
        close(found[:, [2, 5]], mean[:, [2, 5]], 1e-6)
        assert np.abs(found.numpy() - mean).max() > 0.01


def test_what_no_likelihood_hangs_on_is_the_weighted_mean(tmp_path: Path) -> None:
    """Embeddings of tokens that occur nowhere, with a head of its own."""
    write_models(tmp_path, config("llama", tied=False), change=0.2)
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, "fisher")
    found = merged(recipe, tmp_path / "out")["model.embed_tokens.weight"]
    both = [one["model.embed_tokens.weight"] for one in weights(tmp_path)]
    close(found[258:], (both[0] + both[1])[258:] / 2, 1e-6)


def test_sampled_labels_are_the_models_own(tmp_path: Path) -> None:
    """Frequencies of draws are probabilities; a draw hangs on seed and place alone."""
    from array import array

    from merge_cli.calibration.fisher import drawn
    from merge_cli.evaluation.forward import Example

    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).repeat(4000, 1)
    example = Example(array("i", range(4001)), 1)
    labels = drawn(logits, example, 0)
    shares = torch.bincount(labels, minlength=4).double() / 4000
    assert torch.allclose(shares, logits[0].double().softmax(-1), atol=0.03)
    assert torch.equal(labels, drawn(logits, example, 0))
    assert torch.equal(labels[:7], drawn(logits[:7], example, 0))
    assert not torch.equal(labels, drawn(logits, example, 1))


def test_sampled_importances_are_others(models: Path) -> None:
    plain = merged(write_recipe(models, "fisher"), models / "plain")
    statistics = {"targets": "sampled"}
    one = merged(write_recipe(models, "fisher", statistics=statistics), models / "one")
    other = merged(write_recipe(models, "fisher", statistics=statistics, seed=0), models / "other")
    name = next(name for name in one if name.endswith("mlp.down_proj.weight") or "c_fc.w" in name)
    assert not torch.equal(plain[name], one[name])
    assert torch.equal(one[name], other[name])
