"""Every method, run through the engine, against the float64 oracles written from the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.kernels.elect import disjoint_mean
from merge_cli.methods.registry import all_methods, get_method
from merge_cli.planning.layers import layer_key_of
from tests.support import oracles
from tests.support.tiny import Family, llama_family, merge, to_array

WEIGHTS = [1.0, 0.5, -0.3]
DENSITIES = [0.5, 0.9, 0.33]
PER_MODEL = [{"weight": w, "density": d} for w, d in zip(WEIGHTS, DENSITIES, strict=True)]
ONLY_WEIGHTS = [{"weight": w} for w in WEIGHTS]


def assert_close(merged: torch.Tensor, expected: np.ndarray, *, ulps: float = 1.0) -> None:
    """Within `ulps` units in the last place of the output's dtype, plus float32's own rounding."""
    dtype = str(merged.dtype).removeprefix("torch.")
    room = ulps * oracles.ulp(expected, cast(oracles.Dtype, dtype)) if dtype != "float64" else 1e-12
    worst = np.abs(to_array(merged) - expected) - room - 2e-6 * (1 + np.abs(expected))
    assert worst.max(initial=-1) <= 0


def check(family: Family, tmp_path: Path, expected: Any, method: str, **recipe: Any) -> None:
    merged = merge(family.recipe(method, **recipe), tmp_path / "out")
    assert list(merged) == sorted(family.base)
    for name, tensor in merged.items():
        assert_close(tensor, expected(name))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return llama_family(tmp_path, dtype=request.param)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["soup", "linear"])
def test_soup(family: Family, tmp_path: Path, method: str, normalize: bool) -> None:
    def expected(name: str) -> np.ndarray:
        return oracles.soup(family.arrays(name)[1], WEIGHTS, normalize)

    parameters = {"normalize": normalize}
    check(
        family, tmp_path, expected, method, base=False, models=ONLY_WEIGHTS, parameters=parameters
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(family: Family, tmp_path: Path, normalize: bool) -> None:
    def expected(name: str) -> np.ndarray:
        base, models = family.arrays(name)
        return oracles.task_arithmetic(base, models, WEIGHTS, lam=0.7, normalize=normalize)

    parameters = {"normalize": normalize, "lambda": 0.7}
    check(family, tmp_path, expected, "task_arithmetic", models=ONLY_WEIGHTS, parameters=parameters)


@pytest.mark.parametrize("divisor", ["weights", "count"])
@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
def test_ties_by_tensor(tmp_path: Path, elect: Any, divisor: Any) -> None:
    # float64 throughout: election near 0 and thresholds then agree with the oracle exactly
    family = llama_family(tmp_path, dtype=torch.float64)

    def expected(name: str) -> np.ndarray:
        base, models = family.arrays(name)
        return oracles.ties(
            base, models, WEIGHTS, DENSITIES, lam=0.8, elect=elect, divisor=divisor
        )  # fmt: skip

    parameters = {"lambda": 0.8, "elect": elect, "divisor": divisor}
    check(family, tmp_path, expected, "ties", models=PER_MODEL, parameters=parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_in_storage_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    family = llama_family(tmp_path, dtype=dtype)

    def expected(name: str) -> np.ndarray:
        # float32 subtraction of stored values is what the engine trims; it is exact for bfloat16
        base, models = family.arrays(name)
        base32 = base.astype(np.float32)
        deltas = [(m.astype(np.float32) - base32).astype(np.float64) for m in models]
        return oracles.ties(base, [base + d for d in deltas], [1.0] * 3, [0.5] * 3,
                            trimmed=[oracles.trim(d, 0.5) for d in deltas])  # fmt: skip

    check(family, tmp_path, expected, "ties", parameters={"density": 0.5})


def plan_order(family: Family) -> list[str]:
    def key(name: str) -> tuple[int, int, str]:
        place = layer_key_of(name)
        return (1, place.number, place.rest) if place else (2 * ("norm" in name), 0, name)

    return sorted(family.base, key=key)


@pytest.mark.parametrize("density", [0.2, 0.53])
def test_ties_by_model(tmp_path: Path, density: float) -> None:
    family = llama_family(tmp_path, dtype=torch.float64)
    names = plan_order(family)
    arrays = {name: family.arrays(name) for name in names}
    trimmed = [
        dict(
            zip(
                names,
                oracles.trim_model([arrays[n][1][i] - arrays[n][0] for n in names], density),
                strict=True,
            )
        )
        for i in range(3)
    ]

    def expected(name: str) -> np.ndarray:
        base, models = arrays[name]
        return oracles.ties(
            base, models, WEIGHTS, [density] * 3, trimmed=[t[name] for t in trimmed]
        )

    parameters = {"trim": "model", "density": density}
    check(family, tmp_path, expected, "ties", models=ONLY_WEIGHTS, parameters=parameters)


def test_ties_as_the_paper_does(tmp_path: Path) -> None:
    family = llama_family(tmp_path, dtype=torch.float64)
    names = plan_order(family)
    arrays = {name: family.arrays(name) for name in names}
    trimmed = [
        dict(
            zip(
                names,
                oracles.trim_model([arrays[n][1][i] - arrays[n][0] for n in names], 0.2),
                strict=True,
            )
        )
        for i in range(3)
    ]
    balance = sum(np.sign(sum(t[n] for t in trimmed)).sum() for n in names)
    assert balance

    def expected(name: str) -> np.ndarray:
        base, models = arrays[name]
        return oracles.ties(
            base, models, [1.0] * 3, [0.2] * 3, elect="unweighted", divisor="count",
            zero="majority", majority_sign=int(np.sign(balance)), 
            trimmed=[t[name] for t in trimmed],
        )  # fmt: skip

    check(family, tmp_path, expected, "ties", parameters={"semantics": "paper"})


def test_ties_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    """All magnitudes equal: exactly int(density * n) survive, the first ones, over blocks too."""
    from tests.support.tiny import write_model

    n = 300_000  # more than one block
    base = {"w": torch.zeros(n)}
    source = {"w": torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "a", source)
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [a]\nparameters: {density: 0.9}\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")["w"]
    assert torch.equal(merged[:270_000], source["w"][:270_000])
    assert not merged[270_000:].any()


def masks_of(name: str, shape: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    size = int(np.prod(shape))
    return [
        oracles.keep_mask(seed, i, name, size, d).reshape(shape) for i, d in enumerate(DENSITIES)
    ]


@pytest.mark.parametrize("rescale", ["density", "l1", "none", True, False])
@pytest.mark.parametrize("method", ["dare", "dare_linear", "dare_ties"])
def test_dare(tmp_path: Path, method: str, rescale: Any) -> None:
    family = llama_family(tmp_path, dtype=torch.float64, layers=1)
    oracle = oracles.dare_ties if method == "dare_ties" else oracles.dare
    rule = {True: "density", False: "none"}.get(rescale, rescale)

    def expected(name: str) -> np.ndarray:
        base, models = family.arrays(name)
        masks = masks_of(name, base.shape, seed=7)
        return oracle(base, models, WEIGHTS, DENSITIES, masks, lam=0.9, rescale=rule)

    parameters = {"rescale": rescale, "lambda": 0.9}
    check(family, tmp_path, expected, method, models=PER_MODEL, parameters=parameters, seed=7)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(family: Family, tmp_path: Path, t: float) -> None:
    def expected(name: str) -> np.ndarray:
        base, models = family.arrays(name)
        return oracles.slerp(base, models[0], t)

    check(family, tmp_path, expected, "slerp", models=[None], parameters={"t": t})


def test_slerp_turns_around_far_models(tmp_path: Path) -> None:
    """Models that are far apart, so that the arc is not the nearly parallel case."""
    one, other = llama_family(tmp_path / "1", seed=1), llama_family(tmp_path / "2", seed=2)
    (tmp_path / "r.yaml").write_text(
        "merge_method: slerp\nmodels: [1/base, 2/base]\nparameters: {t: [0, 1]}\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    for name, tensor in merged.items():
        place = layer_key_of(name)
        t = place.number / 3 if place else 0.0
        expected = oracles.slerp(to_array(one.base[name]), to_array(other.base[name]), t)
        assert_close(tensor, expected)


def test_passthrough(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("passthrough", base=False, models=[None])
    merged = merge(recipe, tmp_path / "out")
    assert all(torch.equal(tensor, family.models[0][name]) for name, tensor in merged.items())


def test_passthrough_scaled(family: Family, tmp_path: Path) -> None:
    scale = [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]

    def expected(name: str) -> np.ndarray:
        return oracles.passthrough(family.arrays(name)[1][0], 0.5 if "o_proj" in name else 1.0)

    check(family, tmp_path, expected, "passthrough", base=False, models=[{"scale": scale}])


# Properties

# They take one model, or leave out changes that are small or large.
NO_MEANS = ("passthrough", "nearswap", "arcee_fusion", "ram", "ramplus_tl")


@pytest.mark.parametrize("method", ["soup", "task_arithmetic", "ties"])
def test_order_of_sources_does_not_matter(tmp_path: Path, method: str) -> None:
    family = llama_family(tmp_path, dtype=torch.float64)
    names = ["a", "b", "c"]
    merged = []
    for i, order in enumerate([names, names[::-1]]):
        weights = dict(zip(names, WEIGHTS, strict=True))
        entries = [{"model": n, "parameters": {"weight": weights[n]}} for n in order]
        base = {} if method == "soup" else {"base_model": "base"}
        recipe = family.write({"merge_method": method, **base, "models": entries})
        merged.append(merge(recipe, tmp_path / f"out{i}"))
    for name in merged[0]:
        torch.testing.assert_close(merged[0][name], merged[1][name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "method",
    [m.name for m in all_methods() if m.name not in NO_MEANS and m.plain],
)
def test_equal_sources_give_themselves(tmp_path: Path, method: str) -> None:
    """Weights that sum to 1 over equal models leave the model, whatever the method."""
    family = llama_family(tmp_path, dtype=torch.float64)
    weighted = "weight" in get_method(method).parameters
    entry = {"model": "a", **({"parameters": {"weight": 0.5}} if weighted else {})}
    base = {"base_model": "base"} if get_method(method).needs_base else {}
    shared = {"parameters": {"solver": "exact"}} if method == "wudi" else {}
    recipe = family.write({"merge_method": method, **base, "models": [entry, entry], **shared})
    merged = merge(recipe, tmp_path / "out")
    for name, tensor in merged.items():
        room = 1e-6 if method == "wudi" else 1e-12  # an eigendecomposition
        torch.testing.assert_close(tensor, family.models[0][name], rtol=room, atol=room / 100)


def test_density_one_is_no_trim(family: Family, tmp_path: Path) -> None:
    whole = merge(family.recipe("dare", parameters={"density": 1.0}), tmp_path / "dare")
    plain = merge(family.recipe("task_arithmetic"), tmp_path / "plain")
    assert all(torch.equal(whole[name], plain[name]) for name in plain)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from([True, False]),
    st.sampled_from(["weights", "count", "nothing"]),
    st.sampled_from([1.0, -1.0]),
)
def test_disjoint_mean_on_small_integers(
    rows: list[list[int]], weighted: bool, divide_by: Any, zero: float
) -> None:
    """Integers, so that sums are exactly 0 often, which is where rules differ."""
    deltas = [np.array(row, dtype=np.float64) for row in rows]
    weights = [1.0, -1.0, 2.0, 0.5][: len(rows)]
    merged = disjoint_mean(
        [torch.from_numpy(d) for d in deltas], weights, weighted_election=weighted,
        divide_by=divide_by, zero_sign=zero,
    )  # fmt: skip
    base = np.zeros(6)
    expected = oracles.ties(
        base, deltas, weights, [1.0] * len(rows), elect="weighted" if weighted else "unweighted",
        normalize=divide_by != "nothing", divisor="count" if divide_by == "count" else "weights",
        zero="majority", majority_sign=int(zero), trimmed=deltas,
    )  # fmt: skip
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-12)


def test_methods_are_functions_still() -> None:
    """The decorator hands the function back: a test calls it like any function."""
    from merge_cli.methods.soup import soup

    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert soup([a, b], weight=[1.0, 3.0], normalize=True).tolist() == [2.5, 5.0]
    assert get_method("linear").function is soup


# Traps


def test_trim_by_model_over_mixed_dtypes(tmp_path: Path) -> None:
    """One tensor of float64 among float32: magnitudes are ranked together all the same."""
    from tests.support.tiny import write_model

    generator = torch.Generator().manual_seed(3)
    base = {"u": torch.zeros(100), "v": torch.zeros(100, dtype=torch.float64)}
    values = {n: torch.randn(100, generator=generator).to(t.dtype) for n, t in base.items()}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "a", values)
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [a]\n"
        "parameters: {trim: model, density: 0.2}\n"
    )
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    expected = oracles.trim_model([to_array(values["u"]), to_array(values["v"])], 0.2)
    for name, array in zip("uv", expected, strict=True):
        np.testing.assert_array_equal(to_array(merged[name]), array)


def test_float64_weights_are_not_rounded() -> None:
    deltas = [torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)]
    mean = disjoint_mean(deltas, [0.1, 0.1], weighted_election=True, divide_by="weights")
    assert abs(float(mean) - 0.25) < 1e-15


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    import merge_cli
    from merge_cli.errors import NonFiniteError
    from tests.support.tiny import read_model, write_model

    write_model(tmp_path / "a", {"w": torch.tensor([1e5, 1.0]).bfloat16()})
    (tmp_path / "r.yaml").write_text("merge_method: soup\nmodels: [a]\ndtype: float16\n")
    with pytest.raises(NonFiniteError, match="too large for float16"):
        merge(tmp_path / "r.yaml", tmp_path / "out")
    options = merge_cli.MergeOptions(allow_non_finite=True)
    merge_cli.merge(tmp_path / "r.yaml", tmp_path / "out", options=options)
    assert read_model(tmp_path / "out")["w"].isinf().tolist() == [True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_that_are_allowed(tmp_path: Path, bad: float) -> None:
    """They are the largest there is, and what is dropped leaves nothing behind."""
    from tests.support.tiny import write_model

    write_model(tmp_path / "base", {"w": torch.zeros(10)})
    write_model(tmp_path / "a", {"w": torch.tensor([bad] * 3 + [1.0] * 7)})
    text = "merge_method: {}\nbase_model: base\nmodels: [a]\nparameters: {{density: {}}}\n"
    for method, density in (("ties", 0.2), ("ties", 0.5), ("dare", 0.5)):
        (tmp_path / "r.yaml").write_text(text.format(method, density))
        out = tmp_path / f"{method}{density}"
        merged = merge(tmp_path / "r.yaml", out, allow_non_finite=True)["w"]
        assert merged[3:].isfinite().all()
