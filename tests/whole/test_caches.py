"""What is kept to be found again: a flipped bit is work to do again, never a wrong number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_cli.calibration.store import Writer, find
from merge_cli.checkpoint import fingerprint as fingerprints
from merge_cli.checkpoint.statistics import StatisticsEntry
from merge_cli.comparison.cost import CostLog
from merge_cli.dam import checkpoint
from merge_cli.dam.checkpoint import TrainingWorkspace
from merge_cli.evaluation import cache, teachers
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evolve.journal import SearchWorkspace


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def flips(content: bytes, count: int = 300) -> Iterator[bytes]:
    """The content with one bit changed: every bit, or so many of them."""
    places = range(8 * len(content))
    for place in random.Random(0).sample(places, min(count, len(places))):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def test_statistics(tmp_path: Path) -> None:
    place = tmp_path / "s.safetensors"
    (tmp_path / "s.partial").touch()
    arrays = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.ones(4, np.float32)}
    writer = Writer(
        tmp_path / "s.partial", "gram", {name: value.shape for name, value in arrays.items()},
        {"model.w": StatisticsEntry("one"), "model.v": StatisticsEntry("two", input_first=True)},
    )  # fmt: skip
    for name, value in arrays.items():
        writer.put(name, value)
    made = writer.finish(place, {"tokens": 7, "sums": {"a": 0.1}})
    whole = place.read_bytes()
    found = find(place, read=True)
    assert found is not None
    assert found.digest == made.digest
    assert found.is_whole()
    start = min(ref.offset for ref in found.refs.values())
    header = whole[:start].rstrip(b" ")
    for changed in flips(header):
        place.write_bytes(changed + whole[len(header) :])
        assert find(place, read=True) is None
    for changed in flips(whole[start:]):
        place.write_bytes(whole[:start] + changed)
        assert find(place, read=True) is None
    place.write_bytes(whole[:-1])
    assert find(place, read=True) is None


def test_predictions_of_teachers(tmp_path: Path) -> None:
    place = tmp_path / "t.safetensors"
    table = {
        "ends": torch.tensor([0, 2]), "ids": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "logp": torch.rand(2, 3).half(), "tail": torch.rand(2),
    }  # fmt: skip
    teachers._write(place, table)
    whole = place.read_bytes()
    assert teachers._is_complete(place, read=True)
    for changed in flips(whole, 400):
        place.write_bytes(changed)
        same = whole_table(place)
        assert not teachers._is_complete(place, read=True) or same == whole_table_of(table)


def whole_table_of(table: dict[str, Any]) -> dict[str, Any]:
    return {name: (value.dtype, value.tolist()) for name, value in table.items()}


def whole_table(place: Path) -> dict[str, Any] | None:
    """What a reader would get; None where it would get nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return whole_table_of(load_file(place))
    except (SafetensorError, KeyError):
        return None


def test_evaluations() -> None:
    metric = Metric("loss", "nats per token", "lower", [1.5, 2.5], [3.0, 4.0])
    cache.keep("ab12", TaskResult("math", "loss", {"loss": metric}, [{"text": "née"}]))
    kept = cache.find("ab12", "other name")
    assert kept is not None
    assert kept["loss"].value == metric.value
    place = cache._path("ab12")
    for changed in flips(place.read_bytes()):
        place.write_bytes(changed)
        assert cache.find("ab12", "math") is None
    assert not list(place.parent.glob("tmp*"))


def test_remembered_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED", -1.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    right = fingerprints.model_fingerprint(tmp_path / "model")
    (place,) = (tmp_path / "cache" / "digests").iterdir()
    for changed in flips(place.read_bytes()):
        place.write_bytes(changed)
        assert fingerprints.model_fingerprint(tmp_path / "model") == right


def test_checkpoints_of_training(tmp_path: Path) -> None:
    from safetensors.torch import save

    about = {"key": "k", "position": "{}"}
    content = checkpoint._with_metadata(save({"p0:w": torch.rand(3)}), about, summed=True)
    assert checkpoint._holds(content)
    assert checkpoint._metadata_of(content)["key"] == "k"
    for changed in flips(content.replace(b" ", b"")):
        assert not checkpoint._holds(changed)
    assert not checkpoint._holds(b"")
    with TrainingWorkspace(tmp_path / "out", "k") as folder:
        (folder.path / "checkpoint.safetensors").write_bytes(content[:-2])
        assert folder._checkpoint() is None
    with TrainingWorkspace(tmp_path / "out", "another") as folder:  # a torn one is of nobody
        (folder.path / "checkpoint.safetensors").write_bytes(content)


def test_records_of_training(tmp_path: Path) -> None:
    with TrainingWorkspace(tmp_path / "out", "k") as folder:
        folder.finish({"w": torch.rand(2, 3)}, "soup", {"coefficients": 6})
        record = folder.path / "training.json"
        assert (folder.record() or {})["coefficients"] == 6
        for file in (record, folder.coefficients):
            whole = file.read_bytes()
            for changed in flips(whole, 100):
                file.write_bytes(changed)
                assert folder.record() is None
            file.write_bytes(whole)
        assert folder.record() is not None


def test_journals_of_searches(tmp_path: Path) -> None:
    lines = [{"kind": "candidate", "number": n, "share": 1.0, "genome": [0.5]} for n in range(3)]
    with SearchWorkspace(tmp_path / "out", "k") as folder:
        for line in lines:
            folder.append(line)
        folder.finish({"best": {"genome": [0.5]}})
        whole, record = folder.journal.read_bytes(), folder.path / "search.json"
        kept = record.read_bytes()
    for changed in flips(whole, 60):
        folder.journal.write_bytes(changed)
        with SearchWorkspace(tmp_path / "out", "k") as again:
            assert again.lines == lines[: len(again.lines)]
            assert again.record() == {"best": {"genome": [0.5]}}
    for changed in flips(kept, 60):
        record.write_bytes(changed)
        with SearchWorkspace(tmp_path / "out", "k") as again:
            assert again.record() is None


@pytest.mark.parametrize("kind", [SearchWorkspace, TrainingWorkspace])
def test_folders_of_the_users(tmp_path: Path, kind: Any) -> None:
    from merge_cli.errors import UsageError

    path = kind(tmp_path / "out", "k").path
    path.mkdir()
    (path / "letter.txt").write_text("mine")
    for fresh in (False, True):
        with (
            pytest.raises(UsageError, match="is not an unfinished"),
            kind(tmp_path / "out", "k", fresh=fresh),
        ):
            pass
    assert (path / "letter.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == [path.name]


def test_costs_of_comparisons(tmp_path: Path) -> None:
    place = tmp_path / "costs.jsonl"
    ledger = CostLog(place)
    for seconds in (1.0, 2.0):
        ledger.note("m", seconds, None, done=True)
    whole = place.read_bytes()
    for changed in flips(whole, 60):
        place.write_bytes(changed)
        assert len(CostLog(place)._attempts) < 2
        assert CostLog(place)._attempts == ledger._attempts[: len(CostLog(place)._attempts)]
