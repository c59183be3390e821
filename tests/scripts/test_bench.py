"""The benchmark runs and says what it should. No timing is judged here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.torch import load_file as load_torch

from tests.support.paths import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """scripts/synthetic.py; scripts are not a package."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("synthetic")
    sys.modules.pop("synthetic", None)


@pytest.fixture
def bench_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("bench_report")
    sys.modules.pop("bench_report", None)


def test_families_are_what_they_say(synthetic: ModuleType, tmp_path: Path) -> None:
    """Real files: the same tensors in any number of shards, sparse changes in one."""
    settings = synthetic.Settings(synthetic.SIZES["tiny"])
    synthetic.make_family(tmp_path / "one", settings)
    synthetic.make_family(tmp_path / "many", replace(settings, shards=10))
    base, dense, sparse = (
        load_torch(tmp_path / "one" / name / "model.safetensors")
        for name in ("base", "model0", "model2")
    )
    assert {n: tuple(t.shape) for n, t in base.items()} == dict(
        synthetic.tensors(synthetic.SIZES["tiny"])
    )
    zeros = [
        float(np.mean([bool(x) for n in base for x in (model[n] == base[n]).flatten()[:500]]))
        for model in (dense, sparse)
    ]
    assert zeros[0] < 0.3
    assert 0.85 < zeros[1] < 0.95
    index = json.loads((tmp_path / "many/model2/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert 8 <= len(files) <= 10
    for file in files:
        for name, value in load_torch(tmp_path / "many/model2" / file).items():
            assert index["weight_map"][name] == file
            assert value.equal(sparse[name])


def test_a_family_is_made_once(synthetic: ModuleType, tmp_path: Path) -> None:
    settings = synthetic.Settings(synthetic.SIZES["tiny"], header_only=True)
    synthetic.make_family(tmp_path / "family", settings)
    written = (tmp_path / "family/base/config.json").stat().st_mtime_ns
    synthetic.make_family(tmp_path / "family", settings)
    assert (tmp_path / "family/base/config.json").stat().st_mtime_ns == written
    assert not synthetic.is_made(tmp_path / "family", replace(settings, shards=3))
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="is not a family"):
        synthetic.make_family(tmp_path / "mine", settings)


def test_ratios_are_taken_round_by_round(bench_report: ModuleType) -> None:
    """The machine slows down by half: the ratios do not notice. mergekit took part once."""

    def raw(seconds: float) -> dict[str, float]:
        figures = ("seconds", "user_seconds", "system_seconds", "io_seconds")
        return {**dict.fromkeys(figures, seconds), "max_rss": 1_000_000}

    rounds = [
        {"floor": raw(1.0), "ours": raw(2.0), "mergekit": raw(20.0)},
        {"floor": raw(2.0), "ours": raw(4.0)},
    ]
    summary = bench_report.summarise(rounds)
    assert summary["floor"]["ours_to_this"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert summary["ours"]["seconds"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    row = {"method": "soup", "cache": "warm", "target": 1.3, "summary": summary}
    last = bench_report.table([row]).splitlines()[-1]
    assert "| 1.50 (1.00..2.00) | 1.50 | 3.00 (2.00..4.00) | 2.00 | 1.3 **missed** |" in last
    assert "| 20.00 | 10.00 | 1 |" in last, "mergekit's time over ours"


def test_merges_against_the_floor(tmp_path: Path) -> None:
    command = [
        sys.executable, str(SCRIPTS / "bench.py"), "--size", "tiny", "--methods", "soup,ties",
        "--rounds", "1", "--no-warm-up", "--threads", "1", "--work", str(tmp_path / "work"),
        "--json", str(tmp_path / "raw.json"), "--markdown", str(tmp_path / "table.md"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() == done.stdout
    assert (
        "| method | cache | floor s | of it I/O s | ours s | ours / floor | target |" in done.stdout
    )
    assert "| ties | warm |" in done.stdout
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert raw.keys() >= {"command", "machine", "threads", "family", "results", "notes"}
    assert raw["machine"]["versions"]["torch"]
    assert [row["method"] for row in raw["results"]] == ["soup", "ties"]
    for row in raw["results"]:
        floor, ours = row["rounds"][0]["floor"], row["rounds"][0]["ours"]
        assert row["summary"]["floor"]["ours_to_this"]["median"] > 0
        assert floor["seconds"] == floor["import_seconds"] + floor["io_seconds"]
        assert floor["bytes_read"] >= ours["bytes_read"] > 3 * ours["bytes_written"] / 1.01
        assert 0.5 < ours["own_peak_rss"] / ours["max_rss"] < 2
        assert ours["stages"]
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["tiny-3"], "outputs are deleted"
