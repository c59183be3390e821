"""`analyze`: each number against its naive definition, verdicts, advice, command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_cli
from merge_cli.analysis import measure
from merge_cli.analysis.advised_recipe import recipe_text
from merge_cli.analysis.differences import config_differences
from merge_cli.analysis.measure import TOP_SHARE
from merge_cli.analysis.model_set import KINDS, kind_of
from merge_cli.analysis.page import render_analysis
from merge_cli.analysis.result import Analysis
from merge_cli.analysis.spectra import effective_rank, sample_positions
from merge_cli.engine import memory
from merge_cli.engine import pool as workers
from merge_cli.engine.device_worker import StagedWorker
from merge_cli.engine.files import Files
from merge_cli.engine.worker_context import HostWorker
from merge_cli.errors import MismatchError, NonFiniteError, SourceError, UsageError
from merge_cli.kernels.matrices import singular_values
from merge_cli.kernels.measures import Relations, add_relations, top_threshold
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.options import MergeOptions
from merge_cli.planning import chunks as units
from tests.support.command import cli, failed
from tests.support.devices import StrictTransfers
from tests.support.html import Page
from tests.support.hub_server import HubServer
from tests.support.tiny import (
    Family,
    Tensors,
    llama_config,
    llama_family,
    llama_tensors,
    write_model,
)

CPU = MergeOptions(device="cpu", threads=2)
CLOSE = 2e-5  # relative: numbers are rounded to six digits


def analyze(*models: Path, base: Path | None = None, **options: Any) -> Analysis:
    return merge_cli.analyze(base=base, models=models, options=replace(CPU, **options))


def of_family(family: Family, *names: str, **options: Any) -> Analysis:
    chosen = [family.folder / name for name in names or family.names]
    return analyze(*chosen, base=family.folder / "base", **options)


def arrays(family: Family, names: list[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The base and every model's delta over some tensors, flat, in float64."""
    base = np.concatenate([family.base[n].double().numpy().ravel() for n in names])
    models = [np.concatenate([m[n].double().numpy().ravel() for n in names]) for m in family.models]
    return base, [model - base for model in models]


# The definitions of docs/analyze.md, element by element.


def naive_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


def naive_step(value: float) -> float:
    """The distance between bfloat16 numbers at a value."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7) if value else 0.0


def naive_largest(delta: np.ndarray) -> set[int]:
    keep = max(1, round(TOP_SHARE * len(delta)))
    least = sorted(abs(x) for x in delta)[-keep]
    return {i for i, x in enumerate(delta) if abs(x) >= least and x != 0}


def naive_effective_rank(matrix: np.ndarray) -> float:
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(matrix @ matrix.T), 0))
    shares = [v / values.sum() for v in values if v > 1e-12 * values.max()]
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_are_what_they_are_defined_as(tmp_path: Path, dtype: torch.dtype) -> None:
    family = llama_family(tmp_path, dtype=dtype, layers=2)
    found = of_family(family)
    assert found.compared == found.tensors == len(family.base)
    for group, names in groups(found, family):
        base, deltas = arrays(family, names)
        theta = np.linalg.norm(base)
        for s, delta in enumerate(deltas):
            assert group.norm[s] == pytest.approx(np.linalg.norm(delta), rel=CLOSE)
            assert group.relative_norm[s] == pytest.approx(np.linalg.norm(delta) / theta, rel=CLOSE)
            assert group.base_cosine[s] == pytest.approx(
                naive_cosine(base, base + delta), rel=CLOSE
            )
            changed = [i for i, x in enumerate(delta) if x != 0]
            assert group.unchanged[s] == pytest.approx(1 - len(changed) / len(delta), rel=CLOSE)
            small = sum(abs(delta[i]) <= naive_step(base[i]) for i in changed)
            assert group.one_step[s] == pytest.approx(small / len(changed), abs=1e-6)
        for i, a in enumerate(deltas):
            for j, b in enumerate(deltas):
                pair = [(x, y) for x, y in zip(a, b, strict=True) if x and y]
                same = sum((x > 0) == (y > 0) for x, y in pair)
                assert group.cosine[i][j] == pytest.approx(naive_cosine(a, b), rel=CLOSE, abs=1e-5)
                assert group.sign_agreement[i][j] == pytest.approx(same / len(pair), rel=CLOSE)
                assert group.equal[i][j] == pytest.approx(np.mean(a == b), rel=CLOSE)
                weights = np.linalg.norm(base + a) * np.linalg.norm(base + b)
                apart = np.linalg.norm(a - b) / math.sqrt(weights)
                assert group.distance[i][j] == pytest.approx(apart, rel=CLOSE, abs=1e-6)
        rows = list(zip(*deltas, strict=True))
        mixed = sum(any(x > 0 for x in row) and any(x < 0 for x in row) for row in rows)
        several = sum(sum(x != 0 for x in row) > 1 for row in rows)
        assert group.conflict == pytest.approx(mixed / len(rows), rel=CLOSE)
        assert group.shared == pytest.approx(several / len(rows), rel=CLOSE)


def groups(found: Analysis, family: Family) -> list[tuple[Any, list[str]]]:
    """A group of each sort, and the tensors that are in it."""
    layer = next(one for one in found.layers if one.name == "model.layers.1")
    kind = next(one for one in found.kinds if one.name == "attention q")
    cell = next(one for one in found.cells if (one.name, one.kind) == (layer.name, "mlp"))
    tensor = next(one for one in found.each if one.name == "model.norm.weight")
    assert found.total is not None
    assert found.inner is not None
    return [
        (found.total, list(family.base)),
        (found.inner, [n for n in family.base if ".layers." in n]),
        (layer, [n for n in family.base if n.startswith("model.layers.1.")]),
        (kind, [n for n in family.base if "q_proj" in n]),
        (cell, [n for n in family.base if n.startswith("model.layers.1.mlp")]),
        (tensor, ["model.norm.weight"]),
    ]


def test_overlap_of_the_largest(family: Family) -> None:
    found = of_family(family)
    shared, sizes, chance = np.zeros((3, 3)), np.zeros(3), np.zeros((3, 3))
    for name in family.base:
        base, deltas = arrays(family, [name])
        sets = [naive_largest(delta) for delta in deltas]
        shared += [[len(a & b) for b in sets] for a in sets]
        sizes += [len(a) for a in sets]
        chance += [[len(a) * len(b) / len(base) for b in sets] for a in sets]
    smaller = np.minimum(sizes[:, None], sizes[None])
    assert found.total is not None
    np.testing.assert_allclose(np.array(found.total.overlap), shared / smaller, rtol=CLOSE)
    np.testing.assert_allclose(np.array(found.total.overlap_chance), chance / smaller, rtol=CLOSE)


def test_thresholds_of_large_tensors_are_sampled_well(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"model.layers.0.mlp.up_proj.weight": torch.randn(900, 500, generator=generator)}
    write_model(tmp_path / "base", base)
    for name in "ab":
        change = torch.randn(900, 500, generator=generator)
        write_model(tmp_path / name, {n: t + 0.1 * change for n, t in base.items()})
    found = analyze(tmp_path / "a", tmp_path / "b", base=tmp_path / "base").total
    assert found is not None
    assert found.overlap is not None
    assert found.overlap_chance is not None
    assert found.overlap_chance[0][1] == pytest.approx(TOP_SHARE, rel=0.1)
    assert found.overlap[0][1] == pytest.approx(TOP_SHARE, rel=0.2)


def test_effective_rank_is_the_definition(family: Family) -> None:
    found = of_family(family)
    assert {one.kind for one in found.spectra} > {"attention q", "mlp", "embedding"}
    for one in found.spectra:
        rows, columns = sample_positions(one.shape, 0, one.name)
        assert (len(rows), len(columns)) == (one.rows, one.columns)
        for s, model in enumerate(family.models):
            change = (model[one.name].double() - family.base[one.name].double()).numpy()
            sample = change[np.ix_(rows, columns)]
            assert one.effective_rank[s] == pytest.approx(naive_effective_rank(sample), rel=1e-4)
            squares = np.linalg.svd(sample)[1] ** 2
            assert one.stable_rank[s] == pytest.approx(squares.sum() / squares[0], rel=CLOSE)


@given(st.integers(1, 40))
def test_effective_rank_of_equal_values_is_their_number(count: int) -> None:
    assert effective_rank(np.full(count, 0.3)) == pytest.approx(count)
    assert effective_rank(np.array([1.0, *[0.0] * count])) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_singular_values_are_lapacks(rows: int, columns: int, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, columns))
    if rank:
        matrix = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    wanted = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix), wanted, atol=2e-7 * wanted[0])


def test_samples_depend_on_seed_and_name_alone() -> None:
    assert sample_positions((900, 500), 0, "a") == sample_positions((900, 500), 0, "a")
    assert sample_positions((900, 500), 0, "a") != sample_positions((900, 500), 1, "a")
    rows, columns = sample_positions((900, 90_000), 0, "a")
    assert len(rows) == len(columns) == 256
    assert rows == sorted(set(rows))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_compiled_counts_are_the_plain_ones(sources: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(sources + 1, size)).astype(np.float32)
    rows[1:] *= random.choice([0, 1e-3, 1.0], (sources, size))
    rows[0] *= random.choice([0, 1e-30, 1.0], size)
    least = [0.0, 0.5, 1e-3, 2.0][:sources]
    ours, plain = Relations.empty(sources), Relations.empty(sources)
    add_relations(list(rows), least, ours)
    add_relations([torch.from_numpy(row) for row in rows], least, plain)
    for name in ("both", "agree", "equal", "large", "steps", "contest"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name), name)
    lengths = np.sqrt(np.diag(plain.gram))
    np.testing.assert_allclose(ours.gram, plain.gram, atol=1e-37 + 1e-5 * lengths.max() ** 2)


@given(
    st.lists(st.integers(-60, 60), min_size=1, max_size=400),
    st.sampled_from([0.001, 0.01, 0.3, 1.0]),
    st.sampled_from([np.float32, np.float64]),
)
def test_where_the_largest_begin(values: list[int], share: float, dtype: Any) -> None:
    changes = (np.array(values) / 48).astype(dtype)
    keep = max(1, round(share * len(values)))
    assert top_threshold(changes, share) == np.sort(np.abs(changes))[-keep]


def numbers(found: Analysis) -> Any:
    """What must not depend on how it was computed."""
    told = found.to_json()
    for cost in ("seconds", "peak_memory", "threads"):
        told.pop(cost)
    return told


def test_threads_blocks_and_shards_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(640, 500, generator=generator)
        for i in range(2)
    }
    for name in ("base", "a", "b"):
        tensors = {
            n: (t + (name != "base") * 0.01 * torch.randn(t.shape, generator=generator)).bfloat16()
            for n, t in whole.items()
        }
        write_model(tmp_path / name, tensors, shards=1 if name == "base" else 2)
    monkeypatch.setattr(units, "UNIT_BYTES", 2 * BLOCK_MULTIPLE * 6)
    paths = tmp_path / "a", tmp_path / "b"
    first = numbers(analyze(*paths, base=tmp_path / "base", threads=1))
    for threads, blocks in ((3, 1), (2, 2), (4, 3), (2, 5)):  # at last a matrix is one block
        monkeypatch.setattr(memory, "_HOST_BLOCK", blocks * BLOCK_MULTIPLE)
        assert numbers(analyze(*paths, base=tmp_path / "base", threads=threads)) == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_tensors_together_are_as_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    family = llama_family(tmp_path, dtype=dtype, layers=6)
    write_model(family.folder / "b", family.models[1], llama_config(layers=6), shards=3)
    together = [numbers(of_family(family, threads=threads)) for threads in (1, 2)]
    monkeypatch.setattr(measure, "_small_inputs", lambda reader, worker: None)
    assert together == [numbers(of_family(family))] * 2


@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F32", "F16")])
def test_a_span_in_one_call_is_as_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, str]
) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(900, 700, generator=generator)
    write_model(tmp_path / "base", {name: weight.to(kinds[dtypes[0]])})
    for model in ("a", "b"):
        change = 0.01 * torch.randn(weight.shape, generator=generator)
        change *= torch.rand(weight.shape, generator=generator) < 0.8
        write_model(tmp_path / model, {name: (weight + change).to(kinds[dtypes[1]])})
    monkeypatch.setattr(units, "UNIT_BYTES", 3 * BLOCK_MULTIPLE * 10)
    paths = tmp_path / "a", tmp_path / "b"
    together = numbers(analyze(*paths, base=tmp_path / "base", threads=2))
    with monkeypatch.context() as plainly:
        plainly.setattr(measure, "RelationStreams", None)  # none is made
        plainly.setattr(HostWorker, "stored_inputs", lambda worker, tensors: None)
        assert numbers(analyze(*paths, base=tmp_path / "base", threads=1)) == together
    weight[899, 699] = math.nan
    write_model(tmp_path / "b", {name: weight.to(kinds[dtypes[1]])})
    with pytest.raises(NonFiniteError, match=f"element {weight.numel() - 1}"):
        analyze(*paths, base=tmp_path / "base")


def test_tensors_are_described_in_their_place(family: Family) -> None:
    """`each` is made when it is asked for, and JSON has it where its readers know it."""
    found = of_family(family)
    assert "each" not in vars(found)
    told = found.to_json()
    assert [row["name"] for row in told["each"]] == [one.name for one in found.each]
    assert sorted(row["name"] for row in told["each"]) == sorted(family.base)
    names = list(told)
    assert names[names.index("cells") : names.index("spectra")] == ["cells", "each"]


def test_torch_finds_what_compiled_loops_find(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = of_family(family).total
    monkeypatch.setattr(workers, "choose_arithmetic", lambda plan: ("torch", "for the test"))
    theirs = of_family(family).total
    for name, value in vars(ours).items():
        if name not in ("name", "layer", "kind"):
            np.testing.assert_allclose(
                np.array(value, float), np.array(getattr(theirs, name), float),
                rtol=CLOSE, atol=1e-6, err_msg=name,
            )  # fmt: skip


def test_staged_lanes_find_the_same(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "choose_arithmetic", lambda plan: ("torch", "for the test"))
    monkeypatch.setattr(memory, "_HOST_BLOCK", 2 * BLOCK_MULTIPLE)
    plain = numbers(of_family(family))

    def staged(files: Files, *_: Any) -> Any:
        return lambda number: StagedWorker(files, StrictTransfers(), BLOCK_MULTIPLE)

    monkeypatch.setattr(measure, "worker_factory", staged)
    assert numbers(of_family(family)) == plain


def test_models_of_the_hub(hub: HubServer, family: Family, tmp_path: Path) -> None:
    for name in ("base", "a"):
        hub.add(f"org/{name}", family.folder / name)
    found = merge_cli.analyze(base="org/base", models=["org/a"], options=CPU)
    assert found.models == ("a",)
    assert found.total == of_family(family, "a").total
    (tmp_path / "r.yaml").write_text(recipe_text(found, tmp_path))
    written = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert written["base_model"].startswith("org/base@")


def test_permuting_the_sources_permutes_the_numbers(family: Family) -> None:
    order = [2, 0, 1]
    plain = of_family(family)
    turned = of_family(family, *[family.names[i] for i in order])
    assert turned.models == tuple(plain.models[i] for i in order)
    assert plain.total is not None
    assert turned.total is not None
    for name in ("norm", "unchanged", "base_cosine"):
        row = getattr(plain.total, name)
        assert getattr(turned.total, name) == tuple(row[i] for i in order)
    for name in ("cosine", "overlap", "sign_agreement", "equal", "distance"):
        matrix = np.array(getattr(plain.total, name))
        np.testing.assert_allclose(
            getattr(turned.total, name), matrix[np.ix_(order, order)], rtol=CLOSE, atol=1e-6
        )
    assert turned.total.conflict == plain.total.conflict


def kinds_of(found: Analysis) -> set[str]:
    return {verdict.kind for verdict in found.verdicts}


def test_the_same_model_and_the_base_itself(family: Family) -> None:
    for copy, original in (("twin", family.models[0]), ("same", family.base)):
        write_model(family.folder / copy, original, llama_config(), shards=2)
    found = of_family(family, "a", "twin", "same", "b")
    told = {v.kind: v.models for v in found.verdicts}
    assert told["identical"] == ("a", "twin")
    assert told["equals_base"] == ("same",)
    assert found.total is not None
    assert found.total.unchanged is not None
    assert found.total.unchanged[2] == 1.0
    assert found.total.cosine is not None
    assert found.total.cosine[0][2] is None  # nothing has no direction
    recipe = found.advice.recipe
    assert recipe is not None
    assert [Path(str(spec.model)).name for spec in recipe.models] == ["a", "b"]


def test_one_differing_element_is_not_the_same_model(tmp_path: Path) -> None:
    tensors = {"w.weight": torch.zeros(3000, 1000)}
    write_model(tmp_path / "base", tensors)
    tensors["w.weight"][17, 3] = 1e-30  # its square is 0 in float32
    write_model(tmp_path / "a", tensors)
    found = analyze(tmp_path / "a", base=tmp_path / "base")
    assert "equals_base" not in kinds_of(found)
    assert found.total is not None
    assert found.total.unchanged == (0.999999,)


def test_not_a_fine_tune_of_that_base(family: Family) -> None:
    other = llama_tensors(torch.Generator().manual_seed(99))
    other = {n: t - 1 if "norm" in n else t for n, t in other.items()}
    write_model(family.folder / "other", other, llama_config())
    found = of_family(family, "a", "other")
    (verdict,) = [v for v in found.verdicts if v.kind == "unrelated"]
    assert verdict.models == ("other",)
    assert verdict.warns
    recipe = found.advice.recipe
    assert recipe is not None
    assert len(recipe.models) == 1
    without = analyze(family.folder / "a", family.folder / "other")
    assert "unrelated" in kinds_of(without)
    assert without.advice.recipe is None


def sparse_family(folder: Path) -> None:
    """A base and two models that move a tenth of the weights by one step of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = {n: t.bfloat16() for n, t in llama_tensors(generator, width=32).items()}
    write_model(folder / "base", base, llama_config(width=32))
    for name in "ab":
        tensors = {}
        for key, value in base.items():
            bits = value.view(torch.int16)
            moved = torch.rand(value.shape, generator=generator) < 0.1
            tensors[key] = (bits + moved.to(torch.int16)).view(torch.bfloat16)
        write_model(folder / name, tensors, llama_config(width=32))


def test_reinforcement_learning(tmp_path: Path) -> None:
    sparse_family(tmp_path)
    found = analyze(tmp_path / "a", tmp_path / "b", base=tmp_path / "base")
    verdicts = [v for v in found.verdicts if v.kind == "rl_like"]
    assert [v.models for v in verdicts] == [("a",), ("b",)]
    assert "looks like" in verdicts[0].text
    assert found.total is not None
    assert found.total.one_step == (1.0, 1.0)
    recipe = found.advice.recipe
    assert recipe is not None
    assert recipe.parameters["lambda"].setting == 1.0


def test_low_rank_and_untouched_modules(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = llama_tensors(generator, width=64)
    write_model(tmp_path / "base", base, llama_config(width=64))
    tensors = dict(base)
    for name, value in base.items():
        if "_proj" in name:
            left = torch.randn(value.shape[0], 4, generator=generator)
            tensors[name] = value + 0.01 * left @ torch.randn(
                4, value.shape[1], generator=generator
            )
    write_model(tmp_path / "lora", tensors, llama_config(width=64))
    found = analyze(tmp_path / "lora", base=tmp_path / "base")
    told = {v.kind: v.text for v in found.verdicts}
    assert "looks like a merged LoRA" in told["low_rank"]
    assert "rl_like" not in told  # its touched matrices are dense
    assert told["untouched"].endswith("embedding, norm.")
    assert all(one.rank_99[0] in (None, 1, 2, 3, 4) for one in found.spectra)


def test_a_loud_source_gets_less_weight(tmp_path: Path) -> None:
    family = llama_family(tmp_path, dtype=torch.float32)
    loud = {n: b + 5 * (a - b) for (n, b), a in zip(
        family.base.items(), family.models[0].values(), strict=True)}  # fmt: skip
    write_model(tmp_path / "loud", loud, llama_config())
    found = of_family(family, "loud", "b")
    assert "louder" in kinds_of(found)
    recipe = found.advice.recipe
    assert recipe is not None
    assert recipe.models[0].parameters["weight"].setting == pytest.approx(0.2, rel=0.1)
    assert recipe.models[1].parameters["weight"].setting == 1.0


def test_vocabularies_that_differ(family: Family) -> None:
    tensors = llama_tensors(torch.Generator().manual_seed(0), vocabulary=50)
    tensors |= {n: t for n, t in family.models[0].items() if "embed" not in n}
    write_model(family.folder / "wide", tensors, llama_config(vocabulary=50))
    found = of_family(family, "a", "wide")
    assert found.compared == len(family.base) - 1
    assert found.tensors == len(family.base)
    assert [key.key for key in found.config] == ["vocab_size"]
    assert found.config[0].values == ("48", "48", "50")
    assert "mismatch" in kinds_of(found)
    assert "vocabularies differ" in found.problems[0]
    assert found.advice.recipe is None
    with pytest.raises(MismatchError, match="no recipe was written"):
        recipe_text(found, family.folder)
    assert "cannot be merged as they are" in Page(render_analysis(found)).text


def test_nothing_in_common(family: Family) -> None:
    write_model(family.folder / "other", {"h.0.attn.weight": torch.ones(4, 4)}, {"model_type": "x"})
    quantised = llama_config() | {"quantization_config": {"quant_method": "gptq"}}
    write_model(family.folder / "small", family.base, quantised)
    for name in ("other", "small"):
        found = of_family(family, name)
        assert found.total is None
        assert found.compared == 0
        assert "cannot be compared" in found.verdicts[0].text
        assert found.config
        Page(render_analysis(found))


def tokenizer(tokens: Mapping[str, int], special: str) -> dict[str, Any]:
    added = [{"id": tokens[special], "content": special, "special": True}]
    return {"model": {"type": "BPE", "vocab": tokens, "merges": []}, "added_tokens": added}


def test_tokenizers_and_chat_templates(family: Family) -> None:
    def write(name: str, tokens: list[str], template: str | None, eos: str) -> None:
        numbered = {token: number for number, token in enumerate(tokens)}
        folder = family.folder / name
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(numbered, "<s>")))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
        if template:
            (folder / "chat_template.jinja").write_text(template)

    write("base", ["<s>", "x", "y"], None, "<s>")
    write("a", ["<s>", "x", "y"], None, "<s>")
    write("b", ["<s>", "y", "x", "z"], "{{ messages }}", "z")
    a, b = of_family(family, "a", "b").tokenizers
    assert not a.differs
    assert (b.missing, b.added, b.renumbered) == (0, 1, 2)
    assert b.special == {"eos_token": "<s> -> z"}
    assert b.template == "added"
    assert "vocabulary" in kinds_of(of_family(family, "b"))
    write("b", ["<s>", "x", "y", "z"], None, "<s>")
    assert "added_tokens" in kinds_of(of_family(family, "b"))
    (family.folder / "b" / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="tokenizer.json"):
        of_family(family, "b")
    (family.folder / "b" / "tokenizer.json").write_text(
        '{"model": {}, "added_tokens": [{"id": 1}]}'
    )
    with pytest.raises(SourceError, match=r"added_tokens\[0\].content must be text"):
        of_family(family, "b")


def test_configs_are_flat_and_ignore_who_wrote_them(family: Family) -> None:
    class Model:
        def __init__(self, config: Mapping[str, Any]) -> None:
            self.config = config

    one = Model({"a": {"b": 1}, "torch_dtype": "x", "transformers_version": "4"})
    two = Model({"a": {"b": 2}, "dtype": "x", "transformers_version": "5", "c": None})
    found = config_differences([one, two])  # type: ignore[list-item]
    assert [(d.key, d.values) for d in found] == [
        ("a.b", ("1", "2")), ("c", ("(absent)", "null")),
    ]  # fmt: skip


def test_without_a_base(family: Family) -> None:
    found = analyze(*(family.folder / name for name in family.names))
    assert found.base is None
    assert found.total is not None
    assert found.total.relative_norm is None
    assert found.total.conflict is None
    assert found.total.overlap is None
    flat = [
        np.concatenate([m[n].double().numpy().ravel() for n in family.base]) for m in family.models
    ]
    for i, a in enumerate(flat):
        assert found.total.norm[i] == pytest.approx(np.linalg.norm(a), rel=CLOSE)
        for j, b in enumerate(flat):
            apart = np.linalg.norm(a - b) / math.sqrt(np.linalg.norm(a) * np.linalg.norm(b))
            assert found.total.distance[i][j] == pytest.approx(apart, rel=CLOSE, abs=1e-6)
            assert found.total.cosine is not None
            assert found.total.cosine[i][j] == pytest.approx(naive_cosine(a, b), rel=CLOSE)
            assert found.total.equal[i][j] == pytest.approx(np.mean(a == b), rel=CLOSE)
    assert found.advice.recipe is not None
    assert found.advice.recipe.merge_method == "soup"
    Page(render_analysis(found))


def test_a_recipe_names_the_models(family: Family) -> None:
    recipe = family.recipe("ties", parameters={"density": 0.5})
    found = merge_cli.analyze(recipe, options=CPU)
    assert found.models == ("a", "b", "c")
    assert numbers(found)["total"] == numbers(of_family(family))["total"]


def test_what_cannot_be_asked(family: Family) -> None:
    with pytest.raises(UsageError):
        merge_cli.analyze()
    with pytest.raises(UsageError):
        merge_cli.analyze(family.recipe("ties"), base=family.folder / "base")
    with pytest.raises(UsageError, match="one model"):
        analyze(family.folder / "a", base=family.folder / "a")
    tensors: Tensors = dict(family.models[0])
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"][5] = math.nan
    write_model(family.folder / "a", tensors, llama_config())
    with pytest.raises(NonFiniteError, match=r"element 5.*model.norm.weight"):
        of_family(family)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention q"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "mlp"),
        ("transformer.h.0.attn.c_attn.weight", "attention qkv"),
        ("transformer.h.0.attn.c_proj.weight", "attention o"),
        ("transformer.h.0.mlp.c_proj.weight", "mlp"),
        ("transformer.wpe.weight", "embedding"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention o"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "attention qkv"),
        ("encoder.block.0.layer.0.SelfAttention.v.weight", "attention v"),
        ("lm_head.weight", "head"),
        ("backbone.layers.0.mixer.A_log", "other"),
    ],
)
def test_kinds_of_modules(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert kind in KINDS


# The command line.


def test_the_command_line_writes_everything(family: Family, tmp_path: Path) -> None:
    page, recipe, out = tmp_path / "a.html", tmp_path / "sub" / "first.yaml", tmp_path / "out"
    recipe.parent.mkdir()
    models = [family.folder / name for name in family.names]
    done = cli("analyze", "--base", family.folder / "base", *models, "--device", "cpu",
               "--html", page, "--write-recipe", recipe, "--layers")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("‖δ‖/‖θ₀‖", "same sign", "attention q", "model.layers.3", "What to try first"):
        assert words in done.stdout
    text = Page(page.read_text(encoding="utf-8")).text
    for words in ("a, b and c, compared with base", "What stands out", "attention q", "layer"):
        assert words in text
    written = recipe.read_text(encoding="utf-8")
    assert written.startswith("# A first recipe")
    assert yaml.safe_load(written)["parameters"]["lambda"] == pytest.approx(1 / 3, abs=1e-4)
    merged = cli("run", recipe, out, "--device", "cpu")
    assert merged.returncode == 0, merged.stderr
    assert (out / "model.safetensors").exists()


def test_json_goes_to_stdout_alone(family: Family) -> None:
    recipe = family.recipe("soup", base=False)
    done = cli("analyze", recipe, "--json", "--device", "cpu", "--threads", "1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == 1
    assert told["seed"] == 3
    assert told["base"] is None
    assert len(told["each"]) == len(family.base)


def test_exit_codes(family: Family, tmp_path: Path) -> None:
    a, base = family.folder / "a", family.folder / "base"
    failed(cli("analyze", "--base", f"{base}e", a), 3, "Did you mean", "base'?")
    failed(cli("analyze", tmp_path / "none.yaml"), 2, "no such recipe")
    failed(cli("analyze", family.recipe("soup"), a), 2, "names all the models")
    failed(cli("analyze", a), 2, "nothing to compare")
    missing = tmp_path / "no" / "folder.html"
    failed(cli("analyze", "--base", base, a, "--html", missing), 2, "no such folder")


def test_the_page_with_many_models(family: Family) -> None:
    generator = torch.Generator().manual_seed(7)
    for i in range(8):
        tensors = {
            n: (t.float() + 0.02 * torch.randn(t.shape, generator=generator)).bfloat16()
            for n, t in family.base.items()
        }
        write_model(family.folder / f"m{i}", tensors, llama_config())
    page = Page(render_analysis(of_family(family, *(f"m{i}" for i in range(8)))))
    assert "mean of all" in page.text
    assert "merged" not in page.texts  # as the label of a row


@pytest.mark.parametrize(
    ("sources", "norm", "said"),
    [(3, 0.009, "try larger ones"), (5, 0.009, "try larger ones"), (4, 0.035, "try smaller ones"),
     (3, 0.035, "was as good as the average of unlike experts or better")],
)  # fmt: skip
def test_the_scale_is_advised_by_what_was_measured(sources: int, norm: float, said: str) -> None:
    from merge_cli.analysis.advice import _measured_here

    assert said in _measured_here(sources, norm)


def test_experts_in_another_order_are_told(tmp_path: Path) -> None:
    """Experts and routers of one model permuted together: the same function, another numbering."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.tensor([1, 2, 3, 0])
    for name in ("fine", "permuted"):
        noise = {k: v + 0.01 * v.std() * torch.randn_like(v) for k, v in start.items()}
        if name == "permuted":
            for key, value in noise.items():
                if ".mlp.gate." in key or ".experts." in key or "block_sparse_moe" in key:
                    noise[key] = value[order]
        model.load_state_dict(noise)
        model.save_pretrained(tmp_path / name)
    found = analyze(tmp_path / "fine", tmp_path / "permuted", base=tmp_path / "base")
    told = [one for one in found.verdicts if one.kind == "routers"]
    assert [one.models for one in told] == [("permuted",)]
    assert "8 of 8 rows of its routers are nearest to another number" in told[0].text
    assert told[0].warns
