"""Reading one field after another: words, numbers, lists, mappings, each with its problems.

What is wrong is collected, not raised, so that one look at a recipe shows all of it.

The keys of a recipe: known, known to be without effect, known but not supported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merge_cli.errors import Problem
from merge_cli.recipe.nodes import Node

_LONGEST = 1000  # characters of a message
_FP8_NAMES = ("fp8", "float8", "float8_e4m3fn", "fp8_e4m3", "e4m3")


class Fields:
    """The part of the recipe's parser that knows nothing of recipes.

    Attributes:
        file: the recipe as messages name it; `folder` is where its relative paths start.
        places: key path -> (line, column), of every key that was looked at.
    """

    def __init__(self, file: str, folder: Path) -> None:
        self.file, self.folder = file, folder
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.places: dict[str, tuple[int, int]] = {}

    def _dtype(self, node: Node | None, key: str, also: tuple[str, ...] = ()) -> str | None:
        word = self._word(node, key)
        if word is None or node is None:
            return None
        name = word.removeprefix("torch.")
        if name not in (*DTYPES, *also):
            hint = nearest(name, (*DTYPES, *also))
            if name in _FP8_NAMES:
                hint = "Write `out_dtype: fp8`; `dtype` is of everything that stays as it is."
            self._add(node, key, f"unknown dtype '{word}'.", hint)
            return None
        return name

    def _word(self, node: Node | None, key: str) -> str | None:
        if node is None or node.value is None:
            return None
        if isinstance(node.value, str) and node.value:
            return node.value
        self._add(node, key, f"must be text (got {node.plain()!r})")
        return None

    def _integer(self, node: Node, key: str) -> int:
        if type(node.value) is int and node.value >= 0:
            return node.value
        self._add(node, key, f"must be a whole number of at least 0 (got {node.plain()!r})")
        return 0

    def _list(self, node: Node | None, key: str) -> list[Node]:
        if node is None:
            return []
        if isinstance(node.value, list) and node.value:
            return node.value
        self._add(node, key, f"must be a list of at least one (got {node.plain()!r})")
        return []

    def _plain_mapping(self, node: Node | None, key: str) -> dict[str, Any]:
        if node is None or node.value is None:
            return {}
        plain = node.plain()
        if not isinstance(plain, dict):
            self._add(node, key, "must be a mapping")
            return {}
        return plain

    def _mapping(self, node: Node, key: str, known: tuple[str, ...]) -> dict[str, Node]:
        """The known children of a mapping; unknown keys are problems, ineffective ones warnings."""
        if not isinstance(node.value, dict):
            self._add(node, key, f"must be a mapping (got {node.plain()!r})")
            return {}
        fields: dict[str, Node] = {}
        for name, child in node.value.items():
            path = f"{key}.{name}" if key else name
            self.places[path] = node.key_places[name]
            if not key and name not in known and name in node.holders:
                self._ineffective(path, "it holds what YAML aliases mean elsewhere")
            elif name in known:
                fields[name] = child
            elif name in INEFFECTIVE:
                self._warn(node, name, path)
            elif not key and name in UNSUPPORTED:
                self.problems.append(self._at(path, f"{UNSUPPORTED[name]}."))
            else:
                self.problems.append(self._at(path, "unknown key.", nearest(name, known)))
        return fields

    def _warn(self, node: Node, name: str, path: str) -> None:
        self.places[path] = node.key_places[name]
        self._ineffective(path, INEFFECTIVE[name])

    def _ineffective(self, path: str, why: str) -> None:
        """A line on a key that is known and does nothing here."""
        line, column = self.places[path]
        self.warnings.append(f"{self.file}:{line}:{column}: {path}: has no effect ({why}).")

    def _at(self, path: str, what: str, hint: str = "") -> Problem:
        line, column = self.places[path]
        return Problem(what, path, self.file, line, column, hint)

    def _add(self, node: Node, key: str, what: str, hint: str = "") -> None:
        if len(what) > _LONGEST:  # a value that fills screens: what is said of it is at both ends
            what = f"{what[: _LONGEST // 2]} ... {what[-_LONGEST // 2 :]}"
        self.problems.append(Problem(what, key, self.file, node.line, node.column, hint))


# Seen in recipes in the wild and without effect in mergekit 0.1.5: one line, not an error.
INEFFECTIVE = {
    "embed_slerp": "mergekit ignores it, too: embeddings are merged like any other tensor",
    "input_model_parameters": "mergekit ignores it, too",
    "residual_weight": "mergekit ignores it, too",
    "override_architecture": "tensors are matched by name, whatever the architecture",
    "int8_mask": "not needed here: masks are never stored",
}
# Of mergekit's, where they do nothing: key -> why.
UNUSED_LAYER_RANGE = "whole models are merged here; layers are chosen under `slices`"
UNUSED_SEED = "`seed` says it"
# The parameters of all of mergekit's methods. It reads those that the method has, where the method
# has them, and passes by the others: so recipes that are copied from one another are full of them.
MERGEKIT_PARAMETERS = frozenset(
    {
        "weight",
        "density",
        "normalize",
        "rescale",
        "lambda",
        "int8_mask",
        "gamma",
        "epsilon",
        "t",
        "scale",
        "select_topk",
        "filter_wise",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "normalize_weights",
        "eps",
        "max_iter",
        "tol",
        "r",
        "alpha",
    }
)
# Known to mergekit or to the field: a recipe that needs them must not run without.
UNSUPPORTED = {
    "genome": "a file of mergekit-evolve; the same search is `merge_method: evolutionary` with "
    "`search` and `objective` here (docs/evolve.md)",
    "experts": "a file of mergekit-moe; mixtures of experts are not made by this version",
    "layer_slices": "a file of bakllama; the same model is `slices` with `passthrough`",
    "data": "`data` belongs to a model: write it under each of `models`",
}
RECIPE_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "seed",
    "random_seed",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
    "metadata",
    "training",
    "statistics",
    "coefficients",
    "inputs",
    "eval",
    "search",
    "objective",
    "output",
)

SOURCE_KEYS = ("models", "slices", "modules")  # one of them lists what is merged

DTYPES = ("float32", "float16", "bfloat16", "float64")
FP8 = "fp8"  # of `out_dtype`: matrices of layers as codes of eight bits with scales, the rest not


def nearest(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or the list of what is known when nothing is near."""
    names = sorted(known)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{match[0]}'?" if match else f"Known: {', '.join(names)}."
