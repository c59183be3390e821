"""Stored heads of models whose configs tie them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.planning.heads import reconcile_heads
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.tiny import Family, Tensors, llama_config, llama_tensors, merge, write_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensors(*, stored: bool) -> Tensors:
    return llama_tensors(torch.Generator().manual_seed(0), layers=1, tied=not stored)


@pytest.mark.parametrize(
    ("version", "own"),
    [("5.24.0", True), ("5.0.0.dev0", True), ("10.1", True), ("4.57.1", False), (None, False),
     ("5", False), (5, False), ("x", False)],
)  # fmt: skip
def test_a_head_that_transformers_5_stores_is_its_own(
    version: object, own: bool, tmp_path: Path
) -> None:
    config = {**llama_config(layers=1), "transformers_version": version}
    for name in "ab":
        write_model(tmp_path / name, tensors(stored=True), config)
    sources = [open_source(ModelRef(name), tmp_path) for name in "ab"]
    found = reconcile_heads(sources)
    assert [HEAD in view for view in found.views] == [own, own]
    assert bool(found.notes) is not own
    assert found.tied is (False if own else None)  # what other loaders go by


def test_beside_one_that_is_tied_it_stays_its_own(tmp_path: Path) -> None:
    config = {**llama_config(layers=1), "transformers_version": "5.1.0"}
    write_model(tmp_path / "a", tensors(stored=True), config)
    write_model(tmp_path / "b", tensors(stored=False), config)
    sources = [open_source(ModelRef(name), tmp_path) for name in "ab"]
    found = reconcile_heads(sources)
    assert found.tied is False
    assert found.views[0][HEAD].name == HEAD
    assert found.views[1][HEAD].name == EMBEDDING


def test_the_word_of_t5_is_about_the_scale_of_its_outputs(tmp_path: Path) -> None:
    about = {"transformers_version": "5.1.0", "model_type": "t5", "tie_word_embeddings": True}
    write_model(tmp_path / "a", tensors(stored=True), {**llama_config(layers=1), **about})
    found = reconcile_heads([open_source(ModelRef("a"), tmp_path)])
    assert found.tied is None
    assert HEAD in found.views[0]


@pytest.mark.parametrize("method", ["linear", "dare_linear"])
def test_an_output_with_a_head_of_its_own_says_so(tmp_path: Path, method: str) -> None:
    """Copies of the embedding are merged otherwise than it is, by a filter or by chance."""
    config = {**llama_config(layers=1), "transformers_version": "5.1.0"}
    for seed, name in enumerate(("base", "a", "b")):
        values = llama_tensors(torch.Generator().manual_seed(seed), layers=1, tied=True)
        write_model(tmp_path / name, {**values, HEAD: values[EMBEDDING].clone()}, config)
    weight = [{"filter": "embed", "value": 0.0}, {"value": 1.0}]
    recipe: dict[str, Any] = {"merge_method": method, "models": [
        {"model": "a", "parameters": {"weight": 1.0}},
        {"model": "b", "parameters": {"weight": weight}},
    ]}  # fmt: skip
    if method == "dare_linear":
        recipe |= {"base_model": "base", "parameters": {"density": 0.5}}
    family = Family(tmp_path, {}, [])
    merged = merge(family.write(recipe), tmp_path / "out")
    assert not torch.equal(merged[HEAD], merged[EMBEDDING])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
