"""Stored heads of models whose configs tie them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_cli.planning.heads import reconcile_heads
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.tiny import Tensors, llama_config, llama_tensors, write_model

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
    assert found.tied is None


def test_beside_one_that_is_tied_it_stays_its_own(tmp_path: Path) -> None:
    config = {**llama_config(layers=1), "transformers_version": "5.1.0"}
    write_model(tmp_path / "a", tensors(stored=True), config)
    write_model(tmp_path / "b", tensors(stored=False), config)
    sources = [open_source(ModelRef(name), tmp_path) for name in "ab"]
    found = reconcile_heads(sources)
    assert found.tied is False
    assert found.views[0][HEAD].name == HEAD
    assert found.views[1][HEAD].name == EMBEDDING
