"""Nodes to sections on data: `training:` and `statistics:` of a recipe, `data:` of a model."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from merge_cli.recipe.fields import Fields
from merge_cli.recipe.keys import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.statistics import Statistics
from merge_cli.recipe.training import (
    GRANULARITIES,
    LOSSES,
    PENALTIES,
    Data,
    Training,
    contradictions,
    preset,
)

Refuse = Callable[[Node, str, str, str], None]  # node, key, what, hint
Read = Callable[[Node], tuple[Any, str]]  # a value, and why it is none


class LearningSections(Fields):
    """The part of the recipe's parser that reads them."""

    def _training(self, node: Node | None, root: Node) -> Training | None:
        if node is None or node.value is None:
            return None
        known = tuple(f.name for f in fields(Training))
        training = parse_training(
            self._mapping(node, "training", known),
            "training",
            lambda at, key, what, hint: self._add(at, key, what, hint),
        )
        listed = root.value.get("models")
        count = len(listed.value) if listed and isinstance(listed.value, list) else 0
        for dial, what, hint in contradictions(training, count):
            place = node.value.get(dial, node) if isinstance(node.value, dict) else node
            self._add(place, f"training.{dial}", what, hint)
        return training

    def _statistics(self, node: Node | None) -> Statistics | None:
        if node is None or node.value is None:
            return None
        known = tuple(f.name for f in fields(Statistics))
        given = read_options(
            Statistics,
            self._mapping(node, "statistics", known),
            "statistics",
            lambda at, key, what, hint: self._add(at, key, what, hint),
        )
        return Statistics(**given)

    def _data(self, node: Node | None, key: str) -> Data | None:
        """A file, several, or a mapping of `files`, `held_out`, or a Hub `dataset`."""
        if node is None or node.value is None:
            return None
        if not isinstance(node.value, dict):
            return Data(files=self._paths(node, key), key=key)
        known = ("files", "held_out", "dataset", "config", "split", "revision")
        fields_of = self._mapping(node, key, known)
        if ("files" in fields_of) == ("dataset" in fields_of):
            self._add(node, key, "give either files or a dataset", "Write `data: FILE`.")
        word = {name: self._word(fields_of.get(name), f"{key}.{name}") for name in known[2:]}
        return Data(
            self._paths(fields_of.get("files"), f"{key}.files"),
            self._paths(fields_of.get("held_out"), f"{key}.held_out"),
            word["dataset"],
            word["config"],
            word["split"] or "train",
            word["revision"],
            key,
        )

    def _paths(self, node: Node | None, key: str) -> tuple[str, ...]:
        if node is None or node.value is None:
            return ()
        words = [node.value] if isinstance(node.value, str) else node.plain()
        if isinstance(words, list) and words and all(isinstance(w, str) and w for w in words):
            for word in words:
                if local_file(word, self.folder) is None:
                    self._add(node, key, f"no such file: {word}")
            return tuple(words)
        self._add(node, key, f"must be a file or a list of files (got {node.plain()!r})")
        return ()


def parse_training(fields_of: Mapping[str, Node], key: str, refuse: Refuse) -> Training:
    """The section's children to dials; wrong values are refused where they stand."""
    readers: dict[str, Read] = {
        "granularity": _granularity,
        "train": _patterns,
        "loss": lambda node: _weights(node, LOSSES),
        "regularize": lambda node: _weights(node, PENALTIES),
    }
    given = read_options(Training, fields_of, key, refuse, readers)
    chosen = preset(given.get("preset", "default"))
    if given.get("activation", "none") != "none" and "preset" not in given:
        chosen = replace(chosen, start="soup")  # see `contradictions`
    return replace(chosen, **given)


def read_options(
    section: type,
    fields_of: Mapping[str, Node],
    key: str,
    refuse: Refuse,
    readers: Mapping[str, Read] | None = None,
) -> dict[str, Any]:
    """What the recipe says of a section's dials, in range.

    Args:
        section: a dataclass whose fields are `training.dial`s.
        readers: for dials that their type alone does not describe.
    """
    hints = get_type_hints(section)
    known = {f.name: f for f in fields(section)}
    given: dict[str, Any] = {}
    for name, node in fields_of.items():
        path = f"{key}.{name}"
        about = known[name].metadata
        read = (readers or {}).get(name)
        value, wrong = read(node) if read else read_value(node, hints[name])
        least, most = about["least"], about["most"]
        if not wrong and _is_number(value):
            if least is not None and value < least:
                wrong = f"must be at least {least:g}"
            elif most is not None and value > most:
                wrong = f"must be at most {most:g}"
        if wrong:
            words = words_of(hints[name])
            hint = nearest(node.value, words) if words and isinstance(node.value, str) else ""
            refuse(node, path, f"{wrong} (got {node.plain()!r}).", hint)
        elif value is not None or type(None) in get_args(hints[name]):
            given[name] = value
    return given


def _granularity(node: Node) -> tuple[Any, str]:
    """A word for all tensors, or a mapping of patterns to words."""
    value = node.plain()
    if isinstance(value, dict) and value and all(kind in GRANULARITIES for kind in value.values()):
        return value, ""
    if isinstance(value, str) and value in GRANULARITIES:
        return value, ""
    words = ", ".join(GRANULARITIES)
    return None, f"must be one of {words}, or parts of tensor names with one of them each"


def _patterns(node: Node) -> tuple[Any, str]:
    words = [node.value] if isinstance(node.value, str) else node.plain()
    if isinstance(words, list) and words and all(isinstance(w, str) and w for w in words):
        return tuple(words), ""
    return None, "must be all, linear, or a list of parts of tensor names"


def _weights(node: Node, names: tuple[str, ...]) -> tuple[Any, str]:
    """A name alone, or a mapping of names to weights."""
    value = node.plain()
    if isinstance(value, str) and value in names:
        return {value: 1.0}, ""
    if value is None or value == {}:
        return {}, ""
    if isinstance(node.value, dict) and set(node.value) <= set(names):
        weights = {name: read_value(child, float) for name, child in node.value.items()}
        if not any(wrong or weight < 0 for weight, wrong in weights.values()):
            return {name: weight for name, (weight, _) in weights.items()}, ""
    return None, f"must be one of {', '.join(names)}, or weights of at least 0 for some of them"


def read_value(node: Node, hint: Any) -> tuple[Any, str]:
    """A node as a field of that type, and why it is none (empty when it is)."""
    value = node.value
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None, ""
    if isinstance(value, str) and float in options and value not in words_of(hint):
        try:  # YAML 1.1 reads 1e-3 as text
            value = float(value)
        except ValueError:
            return None, "must be a number"
    words = []
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option) and isinstance(value, str):
                return value, ""
            words.append("one of " + ", ".join(get_args(option)))
        elif option is bool:
            if isinstance(value, bool):
                return value, ""
            words.append("true or false")
        elif option is int:
            if type(value) is int:
                return value, ""
            words.append("a whole number")
        elif option is float:
            if _is_number(value) and value == value and abs(value) != float("inf"):
                return float(value), ""
            words.append("a number")
    return None, f"must be {' or '.join(words)}"


def words_of(hint: Any) -> list[str]:
    """The words that may stand here, for the nearest one."""
    if get_origin(hint) in (Union, types.UnionType):
        return [word for option in get_args(hint) for word in words_of(option)]
    return list(get_args(hint)) if get_origin(hint) is Literal else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
