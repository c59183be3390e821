"""What a key may hold: numbers, texts, paths, lists and mappings, each with its JSON Schema."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.reference import expanded
from merge_cli.system.untrusted import is_file

# YAML 1.1, as PyYAML reads it, takes 1e-3 for text; editors, which read 1.2, for a number.
NUMBER_AS_TEXT: Schema = {
    "type": "string",
    "pattern": r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$",
}


@dataclass(frozen=True)
class Anything(Form):
    """What is read later, by those who know more; `form` describes it."""

    form: Callable[[], Schema] = dict

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        return node

    def schema(self) -> Schema:
        return self.form()


@dataclass(frozen=True)
class Plain(Form):
    """A number, true or false, a text, one of some words; or one of several of these.

    Attributes:
        hint: the type of the field: float, int, bool, str, Literal[...], None, or a union of them.
    """

    hint: Any
    least: float | None = None
    most: float | None = None

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        value = self._value(node.value)
        if value is REFUSED:
            hint = _near(node, self.words)
            return reader.refuse_type(node, key, f"must be {self.allowed}", hint)
        if _is_number(value):
            if self.least is not None and value < self.least:
                return reader.refuse_type(node, key, f"must be at least {_shown(self.least)}")
            if self.most is not None and value > self.most:
                return reader.refuse_type(node, key, f"must be at most {_shown(self.most)}")
        return value

    def _value(self, value: Any) -> Any:
        if value is None:
            return None if type(None) in self._kinds else REFUSED
        if isinstance(value, str) and value in self.words:
            return value
        for kind in self._kinds:
            if kind is float:
                number = finite(value)
                if number is not None:
                    return number
            elif kind in (int, bool, str) and type(value) is kind:
                return value
        return REFUSED

    @property
    def _kinds(self) -> tuple[Any, ...]:
        return union_members(self.hint)

    @property
    def words(self) -> list[str]:
        """The words that may stand here."""
        literals = [kind for kind in self._kinds if get_origin(kind) is Literal]
        return [word for literal in literals for word in get_args(literal)]

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        names = {bool: "true or false", str: "text"}
        names |= {int: f"a whole number{self._bounds}", float: f"a number{self._bounds}"}
        result = [names[kind] for kind in self._kinds if kind in names]
        if self.words:
            few = len(self.words) <= 2
            result.append(" or ".join(self.words) if few else "one of " + ", ".join(self.words))
        return " or ".join(result)

    @property
    def _bounds(self) -> str:
        if self.least is not None and self.most is not None:
            return f" from {_shown(self.least)} to {_shown(self.most)}"
        if self.most is not None:
            return f" of at most {_shown(self.most)}"
        return "" if self.least is None else f" of at least {_shown(self.least)}"

    def schema(self) -> Schema:
        bounds = {"minimum": self.least, "maximum": self.most}
        bounded = {name: value for name, value in bounds.items() if value is not None}
        plain: dict[Any, list[Schema]] = {
            int: [{"type": "integer", **bounded}],
            float: [{"type": "number", **bounded}, NUMBER_AS_TEXT],
            bool: [{"type": "boolean"}],
            str: [{"type": "string"}],
            type(None): [{"type": "null"}],
        }
        options: list[Schema] = [{"enum": self.words}] if self.words else []
        for kind in self._kinds:
            options += plain.get(kind, [])
        return any_of(*options)


@dataclass(frozen=True)
class Text(Form):
    """A text that is not empty; `line` is one that can be shown in a line."""

    line: bool = False
    message: str = "must be text"

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        value = node.value
        if not isinstance(value, str):
            return reader.refuse_type(node, key, "must be text" if self.line else self.message)
        if self.line and not (value.strip() and value.isprintable()):
            return reader.refuse_type(node, key, "must be a line of text")
        return value if value else reader.refuse_type(node, key, self.message)

    def schema(self) -> Schema:
        return (
            {"type": "string", "pattern": r"\S"}
            if self.line
            else {"type": "string", "minLength": 1}
        )


@dataclass(frozen=True)
class Texts(Form):
    """A text or a list of texts, as a tuple.

    Attributes:
        check: why a text is refused; empty when it is fine.
        empty: whether a list may be empty.
        distinct: whether a text may not be listed twice.
    """

    message: str = "must be a text or a list of texts"
    check: Callable[[str], str] | None = None
    empty: bool = False
    distinct: bool = False

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        texts = [node.value] if isinstance(node.value, str) else node.plain()
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return reader.refuse_type(node, key, self.message)
        if "" in texts:
            return reader.refuse_type(node, key, "must not be empty")
        if not texts and not self.empty:
            return reader.refuse_type(node, key, self.message)
        if self.distinct and len(set(texts)) < len(texts):
            return reader.refuse_type(node, key, "names one twice")
        for text in texts if self.check else ():
            if self.check and (wrong := self.check(text)):
                return reader.refuse_type(node, key, wrong)
        return tuple(texts)

    def schema(self) -> Schema:
        text: Schema = {"type": "string", "minLength": 1}
        listed = {"type": "array", "items": text, "minItems": 0 if self.empty else 1}
        return any_of(text, {**listed, "uniqueItems": True} if self.distinct else listed)


@dataclass(frozen=True)
class Checked(Form):
    """What a function reads: a value, and why it is refused (empty when it is not).

    Attributes:
        function: of the value without positions.
        words: that may stand here, for the nearest one.
    """

    function: Callable[[Any], tuple[Any, str]]
    form: Schema
    words: tuple[str, ...] = ()

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        value, wrong = self.function(node.plain())
        return reader.refuse_type(node, key, wrong, _near(node, self.words)) if wrong else value

    def schema(self) -> Schema:
        return self.form


@dataclass(frozen=True)
class PathForm(Form):
    """A path, which starts at the file's folder; `exists`: of a file that must be there."""

    exists: bool = False

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, str):
            return reader.refuse_type(node, key, "must be a path")
        path = reader.folder / expanded(node.value)
        if self.exists and not is_file(path):
            return reader.refuse(node, key, f"no such file: {path}")
        return path

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True)
class ListOf(Form):
    """A list of at least one; what is refused in it is left out."""

    item: Form
    message: str = "must be a list of at least one"

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, list) or not node.value:
            return reader.refuse_type(node, key, self.message)
        for i, n in enumerate(node.value):
            reader.positions[f"{key}[{i}]"] = (n.line, n.column)
        listed = [self.item.read(n, f"{key}[{i}]", reader) for i, n in enumerate(node.value)]
        return tuple(value for value in listed if value is not REFUSED)

    def schema(self) -> Schema:
        return {"type": "array", "items": self.item.schema(), "minItems": 1}


@dataclass(frozen=True)
class MappingOf(Form):
    """A mapping of names to values of one form; what is refused in it is left out.

    Attributes:
        build: from the name, the value and the key path to what is kept; the value as it is.
    """

    item: Form
    message: str = "must be a mapping"
    hint: str = ""
    least: int = 0
    build: Callable[[str, Any, str], Any] = lambda name, value, key: value

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict) or len(node.value) < self.least:
            return reader.refuse_type(node, key, self.message, self.hint)
        result = {}
        for name, child in node.value.items():
            path = f"{key}.{name}"
            reader.positions[path] = node.key_positions[name]
            value = self.item.read(child, path, reader)
            if value is not REFUSED:
                result[name] = self.build(name, value, path)
        return result

    def schema(self) -> Schema:
        least: Schema = {"minProperties": self.least} if self.least else {}
        return {"type": "object", "additionalProperties": self.item.schema(), **least}


@dataclass(frozen=True)
class Nullable(Form):
    """Another form, or null for nothing of the kind."""

    form: Form

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        return None if node.value is None else self.form.read(node, key, reader)

    def schema(self) -> Schema:
        return any_of(self.form.schema(), {"type": "null"})


def any_of(*options: Schema) -> Schema:
    """One of several schemas; the only one as it is."""
    return options[0] if len(options) == 1 else {"anyOf": list(options)}


def union_members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def finite(value: Any) -> float | None:
    """A finite number, be it as YAML 1.1 writes it; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    finite = _is_number(value) and value == value and abs(value) != float("inf")
    return float(value) if finite else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _near(node: Node, words: Collection[str]) -> str:
    """The word that was meant, if one is near; a message that lists them all needs no more."""
    hint = nearest(node.value, words) if isinstance(node.value, str) else ""
    return hint if hint.startswith("Did") else ""
