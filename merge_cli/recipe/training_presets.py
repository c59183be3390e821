"""Presets of `training:`, and the reader that begins with one: what the recipe says itself wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import Reader
from merge_cli.recipe.sections import section_of
from merge_cli.recipe.training import Training

# What the paper's own runs have in common: sums of weights, one rate from beginning to end.
_PAPER: dict[str, Any] = {
    "granularity": "column",
    "form": "soup",
    "start": "soup",
    "temperature": 2.0,
    "regularize": {"cosine": 0.01},
    "learning_rate": 1e-3,
    "schedule": "constant",
    "tokens": None,
    "held_out_tokens": None,
    "batch_size": 4,
}
_BY_TENSOR: dict[str, Any] = {
    **_PAPER,
    "granularity": "tensor",
    "temperature": 1.0,
    "regularize": {},
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "dam": _PAPER,
    "dam-reference": {
        **_PAPER,
        "activation": "tanh",
        "start": "raw_soup",
        "train": ("linear",),
        "penalize": "parameters",
        "prompt_loss": True,
        "top_k": "full",
        "batch_size": 1,
        "examples": 1729,
        "optimizer": "mofo",
        "clip_norm": 1.0,
        "keep": "last",
    },
    "adamerging": {
        **_BY_TENSOR,
        "form": "task_vector",
        "start": "task_arithmetic",
        "loss": {"entropy": 1.0},
    },
    "expert-merging": {
        **_BY_TENSOR,
        "form": "task_vector",
        "start": "task_arithmetic",
        "loss": {"kl": 1.0},
        "regularize": {"l2": 0.01},
    },
    "learned-soup": {
        **_BY_TENSOR,
        "activation": "softmax",
        "loss": {"cross_entropy": 1.0},
        "learning_rate": 0.05,
    },
}


def preset(name: str) -> Training:
    """A preset with nothing changed."""
    given: dict[str, Any] = {"preset": name, **PRESETS[name]}
    return replace(Training(), **given)


def _training(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Training:
    """A preset with what the recipe itself says, which wins."""
    result = preset(values.get("preset", "default"))
    if values.get("activation", "none") != "none" and "preset" not in values:
        result = replace(result, start="soup")  # see `contradictions`
    return replace(result, **values)


TRAINING = section_of(Training, _training, null=True)
