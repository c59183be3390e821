"""Columns of tensors are the mapping that they stand for."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from merge_cli.checkpoint.header_columns import HeaderColumns
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.stored_tensors import StoredTensors
from merge_cli.checkpoint.tensors import has_names, in_order, same_names

COLUMNS = HeaderColumns(["b", "a"], ["F32", "BF16"], [(2,), (1, 3)], [80, 88], [8, 6])
PATHS = [Path("one"), Path("two")]
TENSORS = {
    "b": TensorRef("b", PATHS[0], "F32", (2,), 80, 8, "m"),
    "a": TensorRef("a", PATHS[1], "BF16", (1, 3), 88, 6, "m"),
}


def test_they_are_the_mapping() -> None:
    stored = StoredTensors(COLUMNS, PATHS, "m")
    assert ("a" in stored, "c" in stored, len(stored)) == (True, False, 2)
    assert [*stored] == [*stored.keys()] == [*TENSORS]
    assert stored.keys() - {"a"} == {"b"}
    assert [*stored.values()] == [*TENSORS.values()]
    assert [*stored.items()] == [*TENSORS.items()]
    assert (stored["a"], stored.get("b"), stored.get("c")) == (TENSORS["a"], TENSORS["b"], None)
    assert stored == TENSORS
    assert {**stored, "c": TENSORS["a"]} == {**TENSORS, "c": TENSORS["a"]}
    assert pickle.loads(pickle.dumps(stored)) == TENSORS
    with pytest.raises(KeyError):
        stored["c"]


def test_models_of_one_header_have_the_same_names() -> None:
    stored, other = StoredTensors(COLUMNS, PATHS, "m"), StoredTensors(COLUMNS, PATHS, "other")
    turned = {"a": TENSORS["a"], "b": TENSORS["b"]}
    assert same_names(stored, other)
    assert same_names(stored, TENSORS)
    assert not same_names(stored, turned)
    assert has_names(stored, turned)
    assert not has_names(stored, {**TENSORS, "c": TENSORS["a"]})
    assert in_order(other, ["a", "b"]) == [ref._replace(model="other") for ref in turned.values()]
