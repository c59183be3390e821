"""The reader of configuration: a file with positions, and all that is wrong with it at once.

Problems are collected, not raised, so that one look at a file shows all of them, each with line and
column. What a key may hold is a `Form` (`forms.py`); keys and what they hold make a section
(`sections.py`).
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from merge_cli.errors import Problem
from merge_cli.recipe.fields import INEFFECTIVE, UNSUPPORTED, nearest
from merge_cli.recipe.nodes import Node

Schema = dict[str, Any]
REFUSED: Any = object()  # what a form returns for a value that it has refused
_LONGEST = 1000  # characters of a message


class Reader:
    """The file that is read, and what is wrong with it.

    Attributes:
        file: as messages name it; `folder` is where its relative paths start.
        mergekit: whether keys that mergekit knows, and that do nothing here, are let pass.
        positions: key path -> (line, column), of every key that was looked at.
    """

    def __init__(self, file: str, folder: Path, *, mergekit: bool = True) -> None:
        self.file, self.folder, self.mergekit = file, folder, mergekit
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.positions: dict[str, tuple[int, int]] = {}

    def refuse(self, node: Node, key: str, message: str, hint: str = "") -> Any:
        """Report a value, at the value; returns REFUSED."""
        if len(message) > _LONGEST:  # a value that fills screens: the two ends say what it is about
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        self.problems.append(Problem(message, key, self.file, node.line, node.column, hint))
        return REFUSED

    def refuse_type(self, node: Node, key: str, message: str, hint: str = "") -> Any:
        """The same, with what stands there."""
        if not hint and isinstance(node.value, bool | datetime.date):
            hint = "YAML reads yes, no, on, off and dates as no text: put a text in quotes."
        return self.refuse(node, key, f"{message} (got {node.plain()!r})", hint)

    def refuse_key(self, path: str, message: str, hint: str = "") -> None:
        """Report a key, at the key."""
        line, column = self.positions[path]
        self.problems.append(Problem(message, path, self.file, line, column, hint))

    def warn(self, path: str, reason: str, node: Node | None = None) -> None:
        """A line on a key that is known and does nothing here.

        Args:
            node: what does nothing, if that is a part of what the key holds.
        """
        line, column = (node.line, node.column) if node is not None else self.positions[path]
        problem = Problem(f"has no effect ({reason}).", path, self.file, line, column)
        self.warnings.append(str(problem))

    def children(self, node: Node, key: str, keys: Collection[str]) -> dict[str, Node] | None:
        """The known children of a mapping; None, and a problem, where there is no mapping.

        Unknown keys are problems, keys without effect are warnings.
        """
        if not isinstance(node.value, dict):
            self.refuse_type(node, key, "must be a mapping")
            return None
        result: dict[str, Node] = {}
        for name, child in node.value.items():
            path = f"{key}.{name}" if key else name
            self.positions[path] = node.key_positions[name]
            if name in keys:
                result[name] = child
            elif self.mergekit and not key and name in node.holders:
                self.warn(path, "it holds what YAML aliases mean elsewhere")
            elif self.mergekit and name in INEFFECTIVE:
                self.warn(path, INEFFECTIVE[name])
            elif self.mergekit and not key and name in UNSUPPORTED:
                self.refuse_key(path, f"{UNSUPPORTED[name]}.")
            else:
                self.refuse_key(path, "unknown key.", nearest(name, keys))
        return result


class Form(ABC):
    """What a key may hold."""

    @abstractmethod
    def read(self, node: Node, key: str, reader: Reader) -> Any:
        """The value; REFUSED, and a problem, where the node holds something else."""

    @abstractmethod
    def schema(self) -> Schema:
        """The same as JSON Schema."""
