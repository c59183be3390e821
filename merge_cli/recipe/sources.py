"""What is merged, as recipes write it: models, slices, modules, parameters, and a token's rows.

Each form stands beside the keys that it reads. Parameters are read for their shape only (scalar,
gradient, rules with filters; values.py says what they mean); which ones a method has, and in which
range, is the business of `planning.method_checks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.recipe.data import DataForm
from merge_cli.recipe.fields import INEFFECTIVE, UNUSED_LAYER_RANGE
from merge_cli.recipe.forms import Anything, Checked, ListOf, MappingOf, Text, any_of
from merge_cli.recipe.models import MODEL
from merge_cli.recipe.nodes import Node, without_empty
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import ModuleSpec, Parameters, SliceSpec, SourceSpec
from merge_cli.recipe.sections import PASSED_BY, Key, Section
from merge_cli.recipe.values import Gradient, Parameter, Rule, Scalar, covers, filter_error

FILTER_HELP = (
    "a part of tensor names, a whole name with * or ?, or a /regular expression/; "
    "without a filter every tensor"
)

# Parameters


@dataclass(frozen=True)
class ScalarForm(Form):
    """A number, a word, or true or false."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        value = node.value
        if isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            try:  # YAML 1.1 reads 1e-3 as text
                number = float(value)
            except ValueError:
                return value
            return number if math.isfinite(number) else value  # a word: `nan` is no number
        return reader.refuse_type(node, key, "must be a number, a word or true/false")

    def schema(self) -> Schema:
        return {"type": ["boolean", "number", "string"]}


@dataclass(frozen=True)
class SettingForm(Form):
    """A parameter's value: a scalar, a gradient over the layers, or rules with filters."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if isinstance(node.value, dict):
            return self._rules([node], key, reader)
        if not isinstance(node.value, list):
            return ScalarForm().read(node, key, reader)
        if not node.value:
            return reader.refuse(node, key, "an empty list has no value")
        if any(isinstance(child.value, dict) for child in node.value):
            return self._rules(node.value, key, reader)
        values: list[Scalar] = [ScalarForm().read(child, key, reader) for child in node.value]
        return REFUSED if any(v is REFUSED for v in values) else Gradient(tuple(values))

    def _rules(self, nodes: list[Node], key: str, reader: Reader) -> Any:
        rules: list[Rule] = []
        for node in nodes:
            rule = self._rule(node, key, reader)
            if rule is REFUSED:
                continue
            earlier = next((before for before in rules if covers(before, rule)), None)
            if earlier is not None:
                after = f"{_described(rule)} stands after {_described(earlier)}"
                reader.warn(key, f"{after}, and the first that matches decides", node)
            rules.append(rule)
        return tuple(rules)

    def _rule(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict):
            filter, value = None, self.read(node, key, reader)
        else:
            values = _RULE.read(node, key, reader)
            filter, value = values.get("filter"), values.get("value", REFUSED)
            if filter and (wrong := filter_error(filter)):
                return reader.refuse(node.value["filter"], f"{key}.filter", wrong)
        if isinstance(value, tuple):
            return reader.refuse(node, key, "filters cannot be nested")
        return value if value is REFUSED else Rule(filter, value)

    def schema(self) -> Schema:
        return setting_schema(ScalarForm().schema())


def _described(rule: Rule) -> str:
    return "a value for all tensors" if rule.filter in (None, "*") else f"the filter {rule.filter}"


_RULE = Section(
    {
        "filter": Key(Text(), FILTER_HELP),
        "value": Key(SettingForm(), "what holds for these tensors", required=True),
    }
)


def setting_schema(scalar: Schema) -> Schema:
    """A parameter whose values are `scalar`: one, a gradient of them, or rules with filters."""
    gradient = {"type": "array", "items": scalar, "minItems": 1}
    filter: Schema = {"type": "string", "minLength": 1, "description": FILTER_HELP}
    rule = {
        "type": "object",
        "properties": {"filter": filter, "value": any_of(scalar, gradient)},
        "required": ["value"],
        "additionalProperties": False,
    }
    mixed = {
        "type": "array",
        "items": any_of(rule, scalar, gradient),
        "contains": {"type": "object"},
    }
    return any_of(scalar, gradient, rule, mixed)


@dataclass(frozen=True)
class ParametersForm(Form):
    """Parameters by name, each with where it stands."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict):
            return reader.refuse(node, key, "must be a mapping of parameters")
        result: dict[str, Parameter] = {}
        for name, child in node.value.items():
            path = f"{key}.{name}"
            reader.positions[path] = node.key_positions[name]
            if name in INEFFECTIVE:
                reader.warn(path, INEFFECTIVE[name])
                continue
            setting = SettingForm().read(child, path, reader)
            if setting is not REFUSED:
                result[name] = Parameter(name, setting, path)
        return result

    def schema(self) -> Schema:
        """Any mapping: which parameters there are depends on the method (json_schema.py)."""
        return {"type": "object"}


PARAMETERS = ParametersForm()


# Models, slices, modules


def _layer_range(value: Any) -> tuple[Any, str]:
    is_range = isinstance(value, list) and all(type(v) is int for v in value)
    if not is_range or len(value) != 2 or not 0 <= value[0] < value[1]:
        return None, "must be [first, last + 1] with 0 <= first < last"
    return (value[0], value[1]), ""


_LAYER: Schema = {"type": "integer", "minimum": 0}
_RANGE: Schema = {"type": "array", "items": _LAYER, "minItems": 2, "maxItems": 2}
_LAYER_HINT = "Write [first, last + 1]."


def _whole(values: dict[str, Any], node: Node, key: str, reader: Reader) -> SourceSpec:
    if values.pop("layer_range", None) is not None:
        reader.warn(f"{key}.layer_range", UNUSED_LAYER_RANGE)
    return _part(values, node, key, reader)


def _part(values: dict[str, Any], node: Node, key: str, reader: Reader) -> SourceSpec:
    return SourceSpec(
        values.get("model", ModelRef("")),
        key,
        values.get("parameters", {}),
        values.get("layer_range"),
        values.get("data"),
    )


_MODEL_KEY = Key(MODEL, "a folder, or an id on the Hub", required=True)
_OF_MODEL = Key(PARAMETERS, "the method's parameters for this model")
WHOLE_MODEL = Section(
    {
        "model": _MODEL_KEY,
        "parameters": _OF_MODEL,
        "data": Key(DataForm(), "examples of what the model is good at"),
        # Whatever it says: mergekit passes it by, too.
        "layer_range": Key(Anything(), "no effect: layers are chosen under `slices`"),
    },
    _whole,
    rules=PASSED_BY,
)
LAYERS_OF_MODEL = Section(
    {
        "model": _MODEL_KEY,
        "layer_range": Key(
            Checked(_layer_range, _RANGE), "[first, last + 1]", required=True, hint=_LAYER_HINT
        ),
        "parameters": _OF_MODEL,
    },
    _part,
    rules=PASSED_BY,
)


@dataclass(frozen=True)
class SourceForm(Form):
    """A model alone, or a mapping with what belongs to it."""

    section: Section

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, str):
            source = self.section.read(node, key, reader)
            return SourceSpec(ModelRef(""), key) if source is REFUSED else source
        if self.section.keys["layer_range"].required:
            reader.refuse(node, f"{key}.layer_range", "missing", _LAYER_HINT)
        model = MODEL.read(node, key, reader)
        return SourceSpec(ModelRef("") if model is REFUSED else model, key)

    def schema(self) -> Schema:
        if self.section.keys["layer_range"].required:
            return self.section.schema()
        return any_of({"type": "string", "minLength": 1}, self.section.schema())


def _slice(values: dict[str, Any], node: Node, key: str, reader: Reader) -> SliceSpec:
    sources = values.get("sources", ())
    if not sources:
        hint = "List at least one source."
        reader.refuse(node, f"{key}.sources", "missing or empty", hint)
    spans = {b - a for s in sources if s.layer_range for a, b in [s.layer_range]}
    if len(spans) > 1:
        message = f"sources have different numbers of layers ({sorted(spans)})"
        reader.refuse(node, f"{key}.sources", message)
    return SliceSpec(sources, key, values.get("parameters", {}), {}, values.get("base_model"))


SLICE = Section(
    {
        "sources": Key(ListOf(SourceForm(LAYERS_OF_MODEL)), "the layers that are merged"),
        "base_model": Key(MODEL, "the base of this slice, instead of the recipe's"),
        "parameters": Key(PARAMETERS, "the method's parameters for this slice"),
    },
    _slice,
    rules={"required": ["sources"], **PASSED_BY},
)


@dataclass(frozen=True)
class SliceForm(Form):
    """A slice, whose own position later messages need."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        reader.positions[key] = (node.line, node.column)
        output_slice = SLICE.read(node, key, reader)
        return SliceSpec((), key) if output_slice is REFUSED else output_slice

    def schema(self) -> Schema:
        return SLICE.schema()


MODELS = Key(ListOf(SourceForm(WHOLE_MODEL)), "the models that are merged")
SLICES = Key(ListOf(SliceForm()), "the output's layers, in order, and what each run is merged from")


def _module(values: dict[str, Any], node: Node, key: str, reader: Reader) -> ModuleSpec:
    given = without_empty(node).value
    if ("models" in given) == ("slices" in given):
        reader.refuse(node, key, "give either models or slices")
    shared: Parameters = values.get("parameters", {})
    listed = values.get("models", ())
    slices = tuple(replace(part, outer=shared) for part in values.get("slices", ()))
    single_slice = (SliceSpec(listed, f"{key}.models", {}, shared),) if listed else ()
    return ModuleSpec("", key, single_slice or slices, shared)


MODULE = Section(
    {
        "models": MODELS,
        "slices": SLICES,
        "parameters": Key(PARAMETERS, "the method's parameters for this module"),
    },
    _module,
    rules={"oneOf": [{"required": ["models"]}, {"required": ["slices"]}], **PASSED_BY},
)


@dataclass(frozen=True)
class ModulesForm(Form):
    """Modules of a multimodal model by name, as a tuple."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        modules = _MODULES.read(node, key, reader)
        return () if modules is REFUSED else tuple(modules.values())

    def schema(self) -> Schema:
        return _MODULES.schema()


def _named(name: str, module: ModuleSpec, key: str) -> ModuleSpec:
    return replace(module, name=name)


_MODULES = MappingOf(MODULE, "must be a mapping of at least one module", "", 1, _named)
