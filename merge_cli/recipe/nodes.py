"""YAML as a tree of values that remember where they stand.

PyYAML's composer gives nodes with marks; this module turns them into `Node`s and finds what YAML
itself lets pass in silence: duplicate keys, keys that are lists, tags and numbers that mean
nothing here, text that cannot be shown. It knows nothing of recipes.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from merge_cli.errors import Problem, RecipeError
from merge_cli.system.untrusted import CONTROL, MAX_DIGITS, called
from merge_cli.system.untrusted_yaml import MAX_YAML, GuardedLoader, yaml_reason

_SCALARS = (type(None), bool, int, float, str, datetime.date)


@dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes or a dict of nodes, with its line and column (from 1).

    `holders` are the keys of a document whose value, or a part of it, is used elsewhere by alias.
    """

    value: Any
    line: int
    column: int
    key_positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    holders: frozenset[str] = frozenset()

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
    if len(text) > MAX_YAML:
        message = f"more than {MAX_YAML} characters, the most that such a file may have"
        raise RecipeError([Problem(message, file=file)])
    problems: list[Problem] = []
    documents: list[Node] = []
    try:
        loader = GuardedLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                if node is not None:
                    converter = _Converter(loader, file, problems)
                    root = converter.convert(node, "")
                    documents.append(replace(root, holders=anchor_holders(root, converter.uses)))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        reason, line, column = yaml_reason(error, text)
        message = f"not valid YAML: {reason}"
        raise RecipeError([Problem(message, file=file, line=line, column=column)]) from None
    if problems:
        raise RecipeError(problems)
    return documents


def without_empty(node: Node) -> Node:
    """A mapping without the keys whose value is null: to give nothing is not to give."""
    if not isinstance(node.value, dict):
        return node
    kept = {name: child for name, child in node.value.items() if child.value is not None}
    return replace(node, value=kept)


def anchor_holders(root: Node, uses: Mapping[int, int]) -> frozenset[str]:
    """The keys of a mapping that hold, somewhere, what is used outside of them.

    Args:
        uses: how often each node is used in the document, by its id.
    """
    children = root.value.items() if isinstance(root.value, dict) else ()
    return frozenset(name for name, child in children if _used_outside(child, uses))


def _used_outside(top: Node, uses: Mapping[int, int]) -> bool:
    inside: Counter[int] = Counter({id(top): 1})
    waiting, seen = [top], {id(top)}
    while waiting:
        value = waiting.pop().value
        children = value.values() if isinstance(value, dict) else value
        for child in children if isinstance(value, dict | list) else ():
            inside[id(child)] += 1
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return any(uses[item] > count for item, count in inside.items())


class _Converter:
    """PyYAML's nodes to ours, each once: aliases share their node, however often they occur."""

    def __init__(self, loader: yaml.SafeLoader, file: str, problems: list[Problem]) -> None:
        self._loader, self._file, self._problems = loader, file, problems
        self._done: dict[int, Node] = {}
        self.uses: Counter[int] = Counter()  # of each node, by its id: 1, and 1 for each alias

    def convert(self, node: yaml.Node, key: str) -> Node:
        """A node, whose key path is for messages."""
        if id(node) not in self._done:
            line, column = node.start_mark.line + 1, node.start_mark.column + 1
            self._done[id(node)] = self._new(node, key, line, column)
        done = self._done[id(node)]
        self.uses[id(done)] += 1
        return done

    def _new(self, node: yaml.Node, path: str, line: int, column: int) -> Node:
        if isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:map":
                self._wrong(f"an unknown tag, {_short(node.tag)}", path, line, column)
            # Looked for before `<<` is merged in: overriding a merged key is what merging is for.
            _report_duplicates(node, self._file, self._problems)
            self._loader.flatten_mapping(node)
            children: dict[str, Node] = {}
            positions: dict[str, tuple[int, int]] = {}
            for key_node, value_node in node.value:
                mark = key_node.start_mark
                key = self._key(key_node, path, mark.line + 1, mark.column + 1)
                children[key] = self.convert(value_node, f"{path}.{key}" if path else key)
                positions[key] = (mark.line + 1, mark.column + 1)
            return Node(children, line, column, positions)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                self._wrong(f"an unknown tag, {_short(node.tag)}", path, line, column)
            listed = [self.convert(child, f"{path}[{i}]") for i, child in enumerate(node.value)]
            return Node(listed, line, column)
        return Node(self._scalar(node, path, line, column), line, column)

    def _key(self, node: yaml.Node, path: str, line: int, column: int) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self._wrong("a key must be text, and this is a list or a mapping", path, line, column)
            return ""
        key = str(node.value)
        if result := CONTROL.search(key):
            self._wrong(f"a key holds {called(result[0])}", path, line, column)
        return key

    def _scalar(self, node: yaml.Node, path: str, line: int, column: int) -> Any:
        """The value of a scalar; None, and a problem, where it means nothing here."""
        tag = _short(node.tag)
        if tag == "!!int" and len(node.value) > 4 * MAX_DIGITS:
            self._wrong(f"a number of more than {MAX_DIGITS} digits", path, line, column)
            return None
        try:
            value = self._loader.construct_object(node)
        except yaml.constructor.ConstructorError as error:
            is_known_tag = "determine a constructor" not in str(error.problem)
            message = (
                f"not a valid value: {error.problem}" if is_known_tag else f"an unknown tag, {tag}"
            )
            self._wrong(message, path, line, column)
            return None
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # PyYAML's functions take what a tag promises for granted: a date that is none,
            # `!!bool maybe`, `!!int` without digits.
            text = str(node.value)[:40]
            why = str(error) if isinstance(error, ValueError) else f"'{text}' is no {tag}"
            self._wrong(f"not a valid value: {why}", path, line, column)
            return None
        if not isinstance(value, _SCALARS):
            self._wrong(f"not a valid value: nothing here is of the kind {tag}", path, line, column)
            return None
        if isinstance(value, str) and (result := CONTROL.search(value)):
            self._wrong(f"the text holds {called(result[0])}", path, line, column)
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._wrong(f"not a finite number: {node.value}", path, line, column)
            return None
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            self._wrong(f"a number of more than {MAX_DIGITS} digits", path, line, column)
            return None
        if tag in ("!!int", "!!float") and (wrong := _misread(str(node.value), value)):
            hint = "Write the number in full, or a text in quotes."
            self._wrong(wrong, path, line, column, hint)
            return None
        return value

    def _wrong(self, message: str, path: str, line: int, column: int, hint: str = "") -> None:
        self._problems.append(Problem(message, path, self._file, line, column, hint))


_DECIMAL = re.compile(r"[-+]?[0-9_]+")


def _misread(text: str, value: Any) -> str:
    """Why a number is not what its reader takes it for; empty where it is.

    YAML 1.1 counts in sixties after a colon, and in eights after a leading 0.
    """
    if ":" in text:
        return f"{text} is {value} to YAML, which counts in sixties after a colon."
    if _DECIMAL.fullmatch(text) and int(text.replace("_", "")) != value:
        return f"{text} is {value} to YAML, which counts in eights after a leading 0."
    return ""


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")[:100]


def _report_duplicates(node: yaml.MappingNode, file: str, problems: list[Problem]) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        key = str(key_node.value)
        line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
        if key in seen and key != "<<":
            message = f"given twice, first on line {seen[key]}"
            problems.append(Problem(message, key, file, line, column, "Keep one of them."))
        seen.setdefault(key, line)
