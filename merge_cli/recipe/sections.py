"""Sections: what a key may hold is declared once, beside what it means.

    @dataclass(frozen=True)
    class Statistics:
        examples: int | None = option(256, "examples of each source", least=1)

    STATISTICS = section_of(Statistics)
    STATISTICS.read(node, "statistics", reader)  # a Statistics; problems are in reader.problems
    STATISTICS.schema()                          # the same as JSON Schema, for editors

Most forms follow from a field's type; a section names its own where a type is not enough (a file
that must exist, a list or a single text).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from merge_cli.recipe.fields import INEFFECTIVE
from merge_cli.recipe.forms import PathForm, Plain, Texts, union_members
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema

# Keys of mergekit's that do nothing: editors let them pass, and do not offer them.
PASSED_BY: Schema = {"patternProperties": {f"^({'|'.join(INEFFECTIVE)})$": {}}}


@dataclass(frozen=True)
class Key:
    """A key of a section.

    Attributes:
        help: one line, for editors and lists of options.
        default: what holds where the key is left out.
        missing: what to say where a required key is missing; `hint` is what to do then.
    """

    form: Form
    help: str
    default: Any = None
    required: bool = False
    hint: str = ""
    missing: str = "missing"


Build = Callable[[dict[str, Any], Node, str, Reader], Any]


@dataclass(frozen=True)
class Section(Form):
    """A mapping whose keys are known.

    Attributes:
        build: makes the section's object of the values that were given, and looks for what does
            not go together; values that were refused are not among them.
        null: whether null is a value (`tokens: null` trains on all of them); otherwise a key
            without a value is absent.
        rules: what JSON Schema has to say besides the keys: which of them go together.
    """

    keys: Mapping[str, Key]
    build: Build = lambda values, node, key, reader: values
    null: bool = False
    rules: Schema = field(default_factory=dict)

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        children = reader.children(node, key, self.keys)
        if children is None:
            return REFUSED
        values: dict[str, Any] = {}
        for name, child in children.items():
            if child.value is None and not self.null:
                continue
            value = self.keys[name].form.read(child, f"{key}.{name}" if key else name, reader)
            if value is not REFUSED:
                values[name] = value
        for name, about in self.keys.items():
            if about.required and (name not in children or children[name].value is None):
                reader.refuse(node, f"{key}.{name}" if key else name, about.missing, about.hint)
        return self.build(values, node, key, reader)

    def schema(self) -> Schema:
        required = [name for name, about in self.keys.items() if about.required]
        return {
            "type": "object",
            "properties": {name: described(about) for name, about in self.keys.items()},
            "additionalProperties": False,
            **({"required": required} if required else {}),
            **self.rules,
        }


def option(
    default: Any = MISSING,
    help: str = "",
    least: float | None = None,
    most: float | None = None,
    form: Form | None = None,
) -> Any:
    """A field that is a key; without a default it must be given.

    Args:
        least, most: of a number; both are allowed themselves.
        form: where the field's type does not say what may stand here.
    """
    about = {"help": help, "least": least, "most": most, "form": form}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


def keys_of(cls: type) -> dict[str, Key]:
    """The keys that a dataclass declares with `option`."""
    hints = get_type_hints(cls)
    result = {}
    for f in fields(cls):
        about = f.metadata
        if "help" not in about:
            continue
        form = about["form"] or _form_of(hints[f.name], about["least"], about["most"])
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        required = default is MISSING
        missing = f"missing: {about['help']}"
        if required:
            result[f.name] = Key(form, about["help"], required=True, missing=missing)
        else:
            result[f.name] = Key(form, about["help"], default)
    return result


def _form_of(hint: Any, least: float | None, most: float | None) -> Form:
    """What a field's type says."""
    kinds = union_members(hint)
    if Path in kinds:
        return PathForm()
    if any(get_origin(kind) is tuple for kind in kinds):
        return Texts(empty=True)
    return Plain(hint, least, most)


def section_of(
    cls: type, build: Build | None = None, *, null: bool = False, **rules: Any
) -> Section:
    """The section that a dataclass declares; without `build` it is read into the class itself."""
    made: Build = build or (lambda values, node, key, reader: cls(**values))
    return Section(keys_of(cls), made, null, rules)


def described(about: Key) -> Schema:
    """A key's schema with its help and its default."""
    result = {**about.form.schema(), "description": about.help}
    if isinstance(about.default, bool | int | float | str):
        result["default"] = about.default
    elif isinstance(about.default, tuple | dict) and about.default:
        plain = about.default
        result["default"] = list(plain) if isinstance(plain, tuple) else dict(plain)
    return result
