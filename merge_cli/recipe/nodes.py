"""YAML as a tree of values that remember where they stand.

PyYAML's composer gives nodes with marks; this module turns them into `Node`s and finds what YAML
itself lets pass in silence: duplicate keys, non-string keys, a file that is not a mapping. It knows
nothing of recipes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from merge_cli.errors import Problem, RecipeError


@dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes or a dict of nodes, with its line and column (from 1)."""

    value: Any
    line: int
    column: int
    key_places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def plain(self) -> Any:
        """The value without positions: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def load_nodes(text: str, file: str) -> list[Node]:
    """Parse YAML text into one node per document.

    Raises:
        RecipeError: not YAML, or duplicate keys, with line and column.
    """
    loader = yaml.SafeLoader(text)
    problems: list[Problem] = []
    documents: list[Node] = []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None:
                documents.append(_Converter(loader, file, problems).convert(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        what = f"not valid YAML: {error.problem or error.context}"
        raise RecipeError([Problem(what, file=file, line=line, column=column)]) from None
    except yaml.YAMLError as error:
        raise RecipeError([Problem(f"not valid YAML: {error}", file=file)]) from None
    finally:
        loader.dispose()
    if problems:
        raise RecipeError(problems)
    return documents


class _Converter:
    """PyYAML's nodes to ours, each once: aliases share their node, however often they occur."""

    def __init__(self, loader: yaml.SafeLoader, file: str, problems: list[Problem]) -> None:
        self._loader, self._file, self._problems = loader, file, problems
        self._done: dict[int, Node | None] = {}

    def convert(self, node: yaml.Node) -> Node:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        if id(node) in self._done:
            done = self._done[id(node)]
            if done is None:
                what = "an alias that contains itself"
                raise RecipeError([Problem(what, "", self._file, line, column)])
            return done
        self._done[id(node)] = None
        converted = self._new(node, line, column)
        self._done[id(node)] = converted
        return converted

    def _new(self, node: yaml.Node, line: int, column: int) -> Node:
        if isinstance(node, yaml.MappingNode):
            # Looked for before `<<` is merged in: overriding a merged key is what merging is for.
            _report_duplicates(node, self._file, self._problems)
            self._loader.flatten_mapping(node)
            children: dict[str, Node] = {}
            places: dict[str, tuple[int, int]] = {}
            for key_node, value_node in node.value:
                key = str(getattr(key_node, "value", key_node))
                children[key] = self.convert(value_node)
                places[key] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            return Node(children, line, column, places)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(child) for child in node.value], line, column)
        try:
            return Node(self._loader.construct_object(node), line, column)
        except (ValueError, AttributeError) as error:  # a date that is none
            self._problems.append(
                Problem(f"not a valid value: {error}", "", self._file, line, column)
            )
            return Node(None, line, column)


def _report_duplicates(node: yaml.MappingNode, file: str, problems: list[Problem]) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key = str(getattr(key_node, "value", key_node))
        line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
        if key in seen and key != "<<":
            what = f"given twice, first on line {seen[key]}"
            problems.append(Problem(what, key, file, line, column, "Keep one of them."))
        seen.setdefault(key, line)
