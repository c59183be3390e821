"""A merge's bytes, its recipe, and how to stop it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.engine.journal import Journal
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.errors import Interrupted
from tests.support.tiny import Family, merge, read_model

RECIPES: dict[str, dict[str, Any]] = {
    "soup": {"base": False, "parameters": {"weight": 0.7}},
    "task_arithmetic": {"parameters": {"weight": 0.7}},
    "ties": {"parameters": {"density": 0.53}},
    "ties model": {"parameters": {"density": 0.53, "trim": "model"}},
    "ties paper": {"parameters": {"semantics": "paper"}},
    "dare": {"parameters": {"density": 0.53, "rescale": "l1"}},
    "dare_ties": {"parameters": {"density": 0.53}},
    "slerp": {"base": False, "models": [None, None], "parameters": {"t": 0.4}},
    "passthrough": {"base": False, "models": [{"scale": 1.5}]},
}


def write_recipe(family: Family, case: str) -> Path:
    return family.recipe(case.partition(" ")[0], **RECIPES[case])


def digest(folder: Path) -> str:
    """SHA-256 over every tensor's name and bytes, whatever file it is in."""
    state = hashlib.sha256()
    for name, tensor in sorted(read_model(folder).items()):
        state.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def interrupt(recipe: Path, out: Path, lines_written: int = 9, **options: Any) -> None:
    """Merge until the journal has exactly so many more lines, then press Ctrl-C."""
    real, seen = Journal.record, 0

    def record(journal: Journal, chunks: Iterable[tuple[int, TensorStats]]) -> None:
        nonlocal seen
        real(journal, chunks)
        seen += 1
        if seen == lines_written:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "record", record)
        with pytest.raises(Interrupted, match="The same command resumes"):
            merge(recipe, out, **options)
