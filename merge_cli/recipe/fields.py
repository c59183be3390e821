"""Reading one field after another: words, numbers, lists, mappings, each with its problems.

What is wrong is collected, not raised, so that one look at a recipe shows all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge_cli.errors import Problem
from merge_cli.recipe.keys import DTYPES, INEFFECTIVE, UNSUPPORTED, nearest
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
