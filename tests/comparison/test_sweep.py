"""A sweep in a comparison: merged in one pass, each variant a model of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge_cli
from tests.support.evolve_tiny import write_family


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return write_family(tmp_path)


def write(path: Path, **keys: Any) -> Path:
    shared = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["a", "b"]}
    path.write_text(yaml.safe_dump({**shared, **keys}, sort_keys=False))
    return path


def test_variants_are_compared_and_merged_once(folder: Path) -> None:
    scales = {"low": 0.2, "high": 0.8, "mid": 0.5}
    variants = {name: {"parameters": {"lambda": scale}} for name, scale in scales.items()}
    sweep = write(folder / "scales.yaml", sweep=variants)
    single = write(folder / "mid.yaml", parameters={"lambda": 0.5})
    out = folder / "out"
    data = folder / "a.validation.jsonl"

    def compare() -> dict[str, Any]:
        options = ["--device", "cpu", "--quiet"]
        return merge_cli.compare([single, sweep], [data], out, options=options).record

    record = compare()
    names = [model["name"] for model in record["models"] if model["role"] == "recipe"]
    assert names == ["mid", "low", "high"]
    assert "scales/mid is the same merge as mid" in record["notes"]
    assert any("each variant's time is that of all" in note for note in record["notes"])
    (made,) = (out / "models").glob("scales-*")
    assert {path.name for path in made.iterdir()} == {*scales, "merge_report.json"}
    by_name = {model["name"]: model for model in record["models"]}
    for name in ("low", "high"):
        alone = merge_cli.evaluate(made / name, [data], cache=False, device="cpu")
        (task,) = by_name[name]["scores"]
        score = by_name[name]["scores"][task]["value"]
        assert alone[task].value == pytest.approx(score)
        assert by_name[name]["cost"]["seconds"] > 0
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert compare()["models"] == record["models"]
    assert times == {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert json.loads((made / "merge_report.json").read_text())["sweep"] == [*scales]
