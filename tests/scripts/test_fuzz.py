"""scripts/fuzz.py: its mutations can be made again, its oracle sees what is wrong."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzzing import targets
from fuzzing.models import SHARDED, write_inputs
from fuzzing.mutations import (
    mutate_bytes,
    mutate_header,
    mutate_json,
    mutate_tree,
    mutate_yaml,
)
from safetensors.numpy import load_file, save_file

from tests.support.paths import ROOT


def test_a_mutation_is_made_again_from_its_seed() -> None:
    tree = {"a": [1, {"b": "c"}], "d": {"e": 2.5}}
    body = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file = struct.pack("<Q", len(body)) + body + b"\0"
    for mutate in (
        lambda draw: mutate_bytes(b"abcdef" * 9, draw),
        lambda draw: mutate_json(json.dumps(tree).encode(), draw),
        lambda draw: repr(mutate_tree(tree, draw)),
        lambda draw: mutate_yaml("a: 1\nb: 2\n", {"a": 1, "b": 2}, draw),
        lambda draw: mutate_header(file, draw),
    ):
        first = [mutate(random.Random(seed)) for seed in range(60)]
        assert first == [mutate(random.Random(seed)) for seed in range(60)]
        assert len(set(first)) > 30
    assert tree == {"a": [1, {"b": "c"}], "d": {"e": 2.5}}


def test_the_oracle_sees_weights_that_are_none_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    targets._weights(tmp_path, random.Random(0))
    good = {
        name: value + 0.5 for name, value in load_file(tmp_path / "a/model.safetensors").items()
    }
    monkeypatch.setattr(targets, "_merged", lambda root, recipe: good)
    with pytest.raises(targets.Wrong, match="is not the mean"):
        targets._weights(tmp_path, random.Random(0))
    index = json.loads((tmp_path / "b" / SHARDED).read_text())
    assert len(index["weight_map"]) == 21
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "a/model.safetensors")
    (tmp_path / "a/model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(targets.Wrong, match="safetensors refuses"):
        targets._weights(tmp_path, random.Random(0))


def test_a_short_run_ends_with_its_counts() -> None:
    command = [sys.executable, ROOT / "scripts/fuzz.py", "--minutes", "0.02", "--only", "rows"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert "refused" in ended.stdout, ended.stderr
    assert "kinds of findings" in ended.stdout
