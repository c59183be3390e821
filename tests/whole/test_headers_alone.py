"""Verbs that promise to read headers alone: no page of a weight may be touched, however it is read.

What the system has of a file in its cache is what somebody has read of it, by a call or a map.
Sources are sparse files of hundreds of megabytes, whose headers are real.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_cli.console.plans import forecast
from merge_cli.drafting.scaffold import study_models
from merge_cli.engine.merge import check_target
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe
from merge_cli.planning.stages import plan_recipe
from tests.support.dam_tiny import config, write_data
from tests.support.sparse import write_sparse

OPTIONS = MergeOptions(device="cpu")
# The system reads ahead of the header.
AHEAD = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mincore")


def pages_read(file: Path) -> list[int]:
    """Bytes at which pages of a file are in the system's cache, beyond the header's."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as seen:
        view = ctypes.c_char.from_buffer(seen)
        there = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size)
        assert libc.mincore(address, length, there) == 0
        del view
    found = [number * mmap.PAGESIZE for number, flag in enumerate(there) if flag & 1]
    return [place for place in found if place > AHEAD]


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a and b, of 0.5 GB each, data, and an empty cache."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    of = config(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2)
    for name in ("base", "a", "b"):
        write_sparse(tmp_path / name, of)
    write_data(tmp_path, ("a", "b"))
    (tmp_path / "held.jsonl").write_text('{"text": "a row of its own"}\n')
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(16 * AHEAD)
    with probe.open("rb") as file:
        file.seek(8 * AHEAD)
        file.read(1)
    if not pages_read(probe):
        pytest.skip("this file system keeps no pages of holes")
    return tmp_path


def plan_it(folder: Path, document: dict[str, Any]) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    plan = plan_recipe(load_recipe(recipe))
    forecast(plan, OPTIONS)
    check_target(plan, folder / "out", OPTIONS)


def plain(folder: Path) -> None:
    for method in ("ties", "dare_linear", "breadcrumbs", "model_stock", "nuslerp"):
        document = {"merge_method": method, "base_model": "base", "models": ["a", "b"]}
        plan_it(folder, document)
        plan_it(folder, {**document, "tokenizer": {"source": "union"}})


def slices(folder: Path) -> None:
    parts = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("a", "b")]
    plan_it(folder, {"merge_method": "passthrough", "slices": parts})


def dam(folder: Path) -> None:
    models = [{"model": name, "data": f"{name}.jsonl"} for name in ("a", "b")]
    plan_it(folder, {"merge_method": "dam", "base_model": "base", "models": models,
                     "training": {"examples": 6, "max_length": 16}})  # fmt: skip


def statistics(folder: Path) -> None:
    models = [{"model": name, "data": f"{name}.jsonl"} for name in ("a", "b")]
    for method in ("regmean", "fisher"):
        plan_it(folder, {"merge_method": method, "models": models,
                         "statistics": {"examples": 3, "max_length": 16}})  # fmt: skip


def searching(folder: Path) -> None:
    inner = {"method": "task_arithmetic", "parameters": {"weight": {"min": 0.0, "max": 1.0}},
             "evaluations": 4}  # fmt: skip
    tasks = [
        {"task": "loss", "data": "a.jsonl"},
        {"task": "kl", "data": "held.jsonl", "teacher": "base", "top_k": 4},
    ]
    plan_it(folder, {"merge_method": "evolutionary", "base_model": "base", "models": ["a", "b"],
                     "search": inner, "objective": tasks})  # fmt: skip


def drafting(folder: Path) -> None:
    study_models(str(folder / "base"), [str(folder / "a"), str(folder / "b")], read=False)


@pytest.mark.parametrize("verb", [plain, slices, dam, statistics, searching, drafting])
def test_no_weight_is_read(sparse: Path, verb: Callable[[Path], None]) -> None:
    verb(sparse)
    for name in ("base", "a", "b"):
        assert pages_read(sparse / name / "model.safetensors") == [], name
    assert not (sparse / "cache").exists()
