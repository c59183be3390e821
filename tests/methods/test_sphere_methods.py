"""The rest of mergekit's methods, through the engine, against oracles that follow their words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from merge_cli.errors import RecipeError
from merge_cli.methods.registry import get_method
from merge_cli.planning.planner import load_recipe
from tests.support import oracles
from tests.support import sphere_oracles as o
from tests.support.tiny import Family, llama_family, merge, to_array

WEIGHTS = [1.0, 0.5, 0.25]
WEIGHTED = [{"weight": w} for w in WEIGHTS]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
Expected = Callable[[str], Any]


@pytest.fixture(params=DTYPES, ids=str)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return llama_family(tmp_path, dtype=request.param)


@pytest.fixture
def exact(tmp_path: Path) -> Family:
    """float64 throughout: what is chosen by rank or threshold is chosen alike."""
    return llama_family(tmp_path, dtype=torch.float64)


def check(
    family: Family, out: Path, expected: Expected, method: str, *, room: float = 2e-6, **keys: Any
) -> None:
    merged = merge(family.recipe(method, **keys), out)
    for name, tensor in merged.items():
        wanted = expected(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        allowed = oracles.ulp(wanted, cast(oracles.Dtype, dtype)) if dtype != "float64" else 0.0
        slack = 1e-10 if dtype == "float64" else room * (1 + np.abs(wanted))
        worst = np.abs(to_array(tensor) - wanted) - allowed - slack
        assert worst.max(initial=-1) <= 0, name


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (False, False), (False, True)])
def test_nuslerp(family: Family, tmp_path: Path, base: bool, flatten: bool, row_wise: bool) -> None:
    def expected(name: str) -> Any:
        start, (a, b, _) = family.arrays(name)
        about = {"flatten": flatten, "row_wise": row_wise}
        if base:
            return start + o.nuslerp(a - start, b - start, 0.25, **about)
        return o.nuslerp(a, b, 0.25, **about)

    parameters = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    models = ({"weight": 3.0}, {"weight": 1.0})
    check(family, tmp_path / "out", expected, "nuslerp", base=base, models=models,
          parameters=parameters)  # fmt: skip


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(family: Family, tmp_path: Path, base: bool, normalize: bool) -> None:
    def expected(name: str) -> Any:
        start, models = family.arrays(name)
        if base:
            return start + o.multislerp([m - start for m in models], WEIGHTS, normalize)
        return o.multislerp(models, WEIGHTS, normalize)

    check(family, tmp_path / "out", expected, "multislerp", base=base, models=WEIGHTED,
          parameters={"normalize_weights": normalize})  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_karcher(family: Family, tmp_path: Path, steps: int) -> None:
    def expected(name: str) -> Any:
        return o.karcher(family.arrays(name)[1], WEIGHTS, steps, 1e-7)

    check(family, tmp_path / "out", expected, "karcher", base=False, models=WEIGHTED,
          parameters={"weighted": True, "max_iter": steps, "tol": 1e-7})  # fmt: skip


def test_karcher_is_where_nothing_pulls(exact: Family, tmp_path: Path) -> None:
    """The mean's definition: the weighted tangents to all models add up to nothing."""
    recipe = exact.recipe("karcher", base=False, models=WEIGHTED,
                          parameters={"weighted": True, "max_iter": 100, "tol": 1e-12})  # fmt: skip
    merged = merge(recipe, tmp_path / "out")
    for name, tensor in merged.items():
        mean = to_array(tensor).reshape(-1)
        mean /= np.linalg.norm(mean)
        pull = np.zeros_like(mean)
        for weight, model in zip(WEIGHTS, exact.arrays(name)[1], strict=True):
            unit = model.reshape(-1) / np.linalg.norm(model)
            theta = np.arccos(unit @ mean)
            pull += weight * theta / np.sin(theta) * (unit - (unit @ mean) * mean)
        assert np.linalg.norm(pull) < 1e-7


@pytest.mark.parametrize("filter_wise", [True, False])
def test_model_stock(family: Family, tmp_path: Path, filter_wise: bool) -> None:
    def expected(name: str) -> Any:
        return o.model_stock(*family.arrays(name), filter_wise)

    check(family, tmp_path / "out", expected, "model_stock", room=1e-5,
          parameters={"filter_wise": filter_wise})  # fmt: skip


def test_nearswap(family: Family, tmp_path: Path) -> None:
    def expected(name: str) -> Any:
        base, (other, *_) = family.arrays(name)
        return o.nearswap(base, other, 0.015)

    check(family, tmp_path / "out", expected, "nearswap", models=(None,), parameters={"t": 0.015})


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram(exact: Family, tmp_path: Path, method: str) -> None:
    def expected(name: str) -> Any:
        base, models = exact.arrays(name)
        plus = method == "ramplus_tl"
        scales = o.ram_scales(base, models, 0.3, 0.4, 0.01) if plus else [1.0] * 3
        return o.ram(base, models, 0.01, scales)

    parameters = {"epsilon": 0.01, **({"r": 0.3, "alpha": 0.4} if method != "ram" else {})}
    check(exact, tmp_path / "out", expected, method, parameters=parameters)


@pytest.mark.parametrize("topk", [1.0, 0.4, 0.0])
def test_sce(exact: Family, tmp_path: Path, topk: float) -> None:
    def expected(name: str) -> Any:
        return o.sce(*exact.arrays(name), topk)

    check(exact, tmp_path / "out", expected, "sce", parameters={"select_topk": topk})


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.5, 0.001), (0.9, 0.4), (1.0, 0.2)])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(
    exact: Family, tmp_path: Path, method: str, density: float, gamma: float
) -> None:
    """int(gamma n) = 0 drops nothing at the top; more outliers than room leaves what is kept."""

    def expected(name: str) -> Any:
        base, models = exact.arrays(name)
        kept = [
            base + np.where(o.breadcrumbs_mask(m - base, density, gamma), m - base, 0.0)
            for m in models
        ]
        if method == "breadcrumbs":
            return oracles.task_arithmetic(base, kept, WEIGHTS, lam=0.8)
        ones = [1.0] * len(kept)
        return oracles.ties(base, kept, WEIGHTS, ones, lam=0.8, normalize=False)

    check(exact, tmp_path / "out", expected, method, models=WEIGHTED,
          parameters={"density": density, "gamma": gamma, "lambda": 0.8})  # fmt: skip


@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della(exact: Family, tmp_path: Path, method: str, rescale: str) -> None:
    def expected(name: str) -> Any:
        base, models = exact.arrays(name)
        kept = []
        for source, model in enumerate(models):
            delta = model - base
            chances = o.della_chances(delta, 0.6, 0.3)
            # The word of each element, by asking the mask of every chance that occurs.
            flat = chances.reshape(-1)
            mask = np.array([
                oracles.keep_mask(7, source, name, 1, float(p), start=i)[0]
                for i, p in enumerate(flat)
            ]).reshape(delta.shape)  # fmt: skip
            dropped = np.where(mask, delta, 0.0)
            if rescale == "density":
                dropped = dropped / chances
            elif rescale == "l1":
                after = np.abs(dropped).sum()
                dropped = dropped * (np.abs(delta).sum() / after if after else 0.0)
            kept.append(base + dropped)
        if method == "della_linear":
            return oracles.task_arithmetic(base, kept, WEIGHTS)
        return oracles.ties(base, kept, WEIGHTS, [1.0] * 3)

    parameters = {"density": 0.6, "epsilon": 0.3, "rescale": rescale}
    check(exact, tmp_path / "out", expected, method, models=WEIGHTED, parameters=parameters,
          seed=7)  # fmt: skip


def test_della_is_unbiased() -> None:
    """Over many seeds the mean of what is kept and rescaled is the task vector."""
    from merge_cli.methods.blocks import Block, Span
    from merge_cli.methods.della import rank

    delta = torch.linspace(-1, 1, 64, dtype=torch.float64)

    class One:
        name, shape, size, wide = "w", (4, 16), 64, True

        def blocks(self) -> Any:
            yield Block(torch.zeros_like(delta), [delta], Span("w", 0, 0, (0,)))

    drop = rank(One(), None, density=[0.5], epsilon=[0.3], rescale="density")  # type: ignore[arg-type]
    total = torch.zeros_like(delta)
    for seed in range(4000):
        total += drop.apply([delta], Span("w", 0, seed, (0,)))[0]
    assert float((total / 4000 - delta).abs().max()) < 0.1


def test_arcee_fusion(exact: Family, tmp_path: Path) -> None:
    def expected(name: str) -> Any:
        base, (other, *_) = exact.arrays(name)
        return o.arcee_fusion(base, other)

    check(exact, tmp_path / "out", expected, "arcee_fusion", models=(None,))
    merged = merge(exact.recipe("arcee_fusion", models=(None,)), tmp_path / "again")
    moved = [float((merged[n] != exact.base[n]).double().mean()) for n in merged]
    assert 0 < max(moved) < 0.5


CASES: dict[str, dict[str, Any]] = {
    "nuslerp": {"models": (None, None)},
    "nuslerp rows": {"models": (None, None), "parameters": {"nuslerp_flatten": False}},
    "multislerp": {},
    "karcher": {"base": False},
    "model_stock": {},
    "model_stock rows": {"parameters": {"filter_wise": True}},
    "nearswap": {"models": (None,)},
    "ram": {},
    "ramplus_tl": {},
    "sce": {"parameters": {"select_topk": 0.3}},
    "breadcrumbs": {"parameters": {"density": 0.4}},
    "breadcrumbs_ties": {"parameters": {"density": 0.4}},
    "della": {"parameters": {"density": 0.5}},
    "della_linear": {"parameters": {"density": 0.5, "rescale": "l1"}},
    "arcee_fusion": {"models": (None,)},
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_units_threads_and_arithmetic_change_no_bit(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli.engine import device, memory
    from merge_cli.kernels import reduce
    from merge_cli.planning import chunks as units

    family = llama_family(tmp_path)
    recipe = family.recipe(case.partition(" ")[0], **CASES[case])
    whole = merge(recipe, tmp_path / "whole", threads=1)
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (reduce, units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(memory, "_HOST_BLOCK", 64)
    small = merge(recipe, tmp_path / "small", threads=3)
    for name in whole:
        # Sums over other runs may round otherwise; what is chosen and cut is the same.
        torch.testing.assert_close(whole[name], small[name], rtol=0.008, atol=0)
    if get_method(case.partition(" ")[0]).supports_numpy:
        monkeypatch.undo()
        monkeypatch.setattr(device, "choose_arithmetic", lambda plan: ("torch", "asked for"))
        from merge_cli.engine import pool

        monkeypatch.setattr(pool, "choose_arithmetic", lambda plan: ("torch", "asked for"))
        plain = merge(recipe, tmp_path / "torch", threads=2)
        assert all(torch.equal(whole[name], plain[name]) for name in whole)


def test_chances_beyond_0_and_1_are_refused_in_the_plan(tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    recipe = family.recipe("della", parameters={"density": 0.9, "epsilon": 0.2})
    from merge_cli.planning.planner import make_plan

    with pytest.raises(RecipeError, match=r"density 0\.9 with epsilon 0\.2"):
        make_plan(load_recipe(recipe))


@pytest.mark.parametrize(
    ("method", "models", "message"),
    [("model_stock", (None,), "2 models"), ("nearswap", (None, None), "1 model"),
     ("nuslerp", (None,), "2 models"), ("arcee_fusion", (None, None), "1 model")],
)  # fmt: skip
def test_numbers_of_models(tmp_path: Path, method: str, models: Any, message: str) -> None:
    family = llama_family(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_recipe(family.recipe(method, models=models))
