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
                documents.append(_convert(loader, node, file, problems, depth=0))
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


def _convert(
    loader: yaml.SafeLoader, node: yaml.Node, file: str, problems: list[Problem], depth: int
) -> Node:
    line, column = node.start_mark.line + 1, node.start_mark.column + 1
    if depth > 50:  # an alias that contains itself never ends otherwise
        raise RecipeError([Problem("nested too deeply", file=file, line=line, column=column)])
    if isinstance(node, yaml.MappingNode):
        # Looked for before `<<` is merged in: overriding a merged key is what merging is for.
        _report_duplicates(node, file, problems)
        loader.flatten_mapping(node)
        children: dict[str, Node] = {}
        places: dict[str, tuple[int, int]] = {}
        for key_node, value_node in node.value:
            key = str(getattr(key_node, "value", key_node))
            children[key] = _convert(loader, value_node, file, problems, depth + 1)
            places[key] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        return Node(children, line, column, places)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(loader, child, file, problems, depth + 1) for child in node.value]
        return Node(items, line, column)
    try:
        return Node(loader.construct_object(node), line, column)
    except ValueError as error:  # e.g. a date that does not exist
        problems.append(Problem(f"not a valid value: {error}", "", file, line, column))
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
