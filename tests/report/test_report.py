"""What a merge says of itself: numbers that are right, a card without secrets."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from tests.support.tiny import Family, merge, write_model


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return report


def flat(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].double().view(-1) for name in names])


def test_statistics_are_the_plain_ones(family: Family, tmp_path: Path) -> None:
    merged = merge(family.recipe("ties", parameters={"density": 0.5}), tmp_path / "out")
    statistics = report_of(tmp_path / "out")["statistics"]
    assert statistics["models"] == ["a", "b", "c"]
    assert statistics["of"] == "deltas"
    layers = [group["layer"] for group in statistics["groups"] if group["layer"] is not None]
    assert layers == [0, 1, 2, 3]
    for group in [statistics["total"], *statistics["groups"]]:
        label = group["name"]
        every = label == "whole model"
        names = [n for n in sorted(family.base) if every or f"{n}.".startswith(f"{label}.")]
        base = flat(family.base, names)
        deltas = [flat(model, names) - base for model in family.models]
        assert group["count"] == len(base)
        assert group["norm"] == pytest.approx([float(d.norm()) for d in deltas], rel=1e-4)
        assert group["relative_norm"][1] == pytest.approx(
            float(deltas[1].norm() / base.norm()), rel=1e-4
        )
        cosine = torch.nn.functional.cosine_similarity(deltas[0], deltas[2], dim=0)
        assert group["cosine"][0][2] == pytest.approx(float(cosine), abs=1e-4)
        both = (deltas[0] != 0) & (deltas[1] != 0)
        agree = (deltas[0].sign() == deltas[1].sign())[both].double().mean()
        assert group["sign_agreement"][0][1] == pytest.approx(float(agree), abs=1e-5)
        signs = torch.stack([d.sign() for d in deltas])
        conflict = ((signs.amax(0) > 0) & (signs.amin(0) < 0)).double().mean()
        assert group["conflict"] == pytest.approx(float(conflict), abs=1e-5)
        change = (flat(merged, names) - base).norm() / base.norm()
        assert group["change"] == pytest.approx(float(change), rel=0.02)  # before rounding
        assert group["kept"] == pytest.approx([0.5] * 3, abs=0.04)


def test_dare_reports_what_it_kept(family: Family, tmp_path: Path) -> None:
    merge(family.recipe("dare", parameters={"density": 0.3}), tmp_path / "out")
    kept = report_of(tmp_path / "out")["statistics"]["total"]["kept"]
    assert kept == pytest.approx([0.3] * 3, abs=0.03)


def test_statistics_can_be_left_out(family: Family, tmp_path: Path) -> None:
    merge(family.recipe("ties"), tmp_path / "out", statistics=False)
    assert report_of(tmp_path / "out")["statistics"] is None
    assert "No statistics were measured" in (tmp_path / "out" / "merge_report.html").read_text()


def test_statistics_on_a_stride_of_large_tensors(tmp_path: Path) -> None:
    """One element in 64 of a large tensor says what all would; norms are those of the whole."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, {"w": torch.randn(1_000_000, generator=generator)})
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [a, b]\n"
    )
    merge(tmp_path / "r.yaml", tmp_path / "out")
    statistics = report_of(tmp_path / "out")["statistics"]
    assert statistics["sampled"] == pytest.approx(1 / 64, abs=0.001)
    assert statistics["total"]["count"] == 1_000_000
    # deltas share the base: correlation 1/2, so that signs differ with chance 1/3
    assert statistics["total"]["cosine"][0][1] == pytest.approx(0.5, abs=0.02)
    assert statistics["total"]["conflict"] == pytest.approx(1 / 3, abs=0.01)
    assert statistics["total"]["norm"] == pytest.approx([2_000_000**0.5] * 2, rel=0.02)
    # a + b - base of independent ones, less the base: a + b - 2 base
    assert statistics["total"]["change"] == pytest.approx(6**0.5, rel=0.02)


def test_cost_and_versions(family: Family, tmp_path: Path) -> None:
    merge(family.recipe("soup", base=False), tmp_path / "out", shard_size=3000)
    report = report_of(tmp_path / "out")
    assert set(report["cost"]["stages"]) == {"read", "compute", "write", "stall"}
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert report["cost"]["bytes_written"] == report["output"]["bytes"] == written
    assert sum(s["bytes"] for s in report["output"]["shards"]) == written
    assert report["cost"]["bytes_read"] == report["cost"]["stages"]["read"]["bytes"]
    assert report["cost"]["peak_rss"] > 50_000_000
    assert report["versions"]["torch"] == version("torch")
    assert [i["model"] for i in report["inputs"]] == ["a", "b", "c"]
    assert len({i["digest"] for i in report["inputs"]}) == 3


def test_every_tensor_is_in_the_report(family: Family, tmp_path: Path) -> None:
    merge(family.recipe("passthrough", base=False, models=[None]), tmp_path / "out")
    tensors = report_of(tmp_path / "out")["tensors"]
    assert {t["name"] for t in tensors} == set(family.base)
    assert {t["action"] for t in tensors} == {"copy"}


def test_card(family: Family, tmp_path: Path) -> None:
    merge(family.recipe("ties", metadata={"author": "me"}), tmp_path / "my-merge")
    card = (tmp_path / "my-merge" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["merge", "merge-cli", "ties"],
    }  # fmt: skip
    assert body.startswith("# my-merge\n")
    assert "A merge of `a`, `b` and `c` by `ties` on `base`, made with" in body
    assert "arxiv.org/abs/2306.01708" in body


def test_no_local_path_leaks(family: Family, tmp_path: Path) -> None:
    """Absolute paths in the recipe, too: card and recipe must not tell whose machine it was."""
    recipe = family.write({
        "merge_method": "ties", "base_model": str(family.folder / "base"),
        "models": [str(family.folder / "a"), str(family.folder / "b")],
    })  # fmt: skip
    merge(recipe, tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    for name in ("README.md", "merge_recipe.yaml"):
        assert str(tmp_path) not in (out / name).read_text()
    again = merge_cli.plan(out / "merge_recipe.yaml")
    assert [s.root.resolve() for s in again.sources] == [
        family.folder / n for n in ("base", "a", "b")
    ]


def test_non_finite_numbers_leave_valid_json(family: Family, tmp_path: Path) -> None:
    tensors = {n: torch.full_like(t, float("nan")) for n, t in family.models[0].items()}
    config = json.loads((family.folder / "a" / "config.json").read_text())
    write_model(family.folder / "a", tensors, config)
    merge(family.recipe("ties"), tmp_path / "out", allow_non_finite=True)
    text = (tmp_path / "out" / "merge_report.json").read_text()
    assert "NaN" not in text
    assert report_of(tmp_path / "out")["statistics"]["total"]["norm"][0] is None


def test_slices_of_different_sources_have_no_common_statistics(
    family: Family, tmp_path: Path
) -> None:
    family.write("""\
merge_method: soup
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 4]}, {model: c, layer_range: [2, 4]}]
""")
    merge(family.folder / "recipe.yaml", tmp_path / "out")
    assert report_of(tmp_path / "out")["statistics"] is None
