"""JSON Schemas of recipes, evaluation files and objectives, made from the forms that read them.

Editors complete keys with them, show what each is for, and underline mistakes (docs/editors.md).
What a schema cannot know stays with the reader: files that must exist, values that depend on one
another, what the models look like. So the reader may refuse what the schema accepts. The other way
round there are three exceptions, which the schema refuses and the reader lets pass: keys without a
value, keys that only hold anchors, mergekit's keys without effect in sections that mergekit lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from merge_cli.evaluation.parse import EVALUATION
from merge_cli.evolve.objectives import OBJECTIVE
from merge_cli.methods.method import Method
from merge_cli.methods.parameters import TRUTH, MethodParameter
from merge_cli.methods.registry import all_methods, get_method, method_names
from merge_cli.recipe.checkpoints import BECOMES
from merge_cli.recipe.fields import INEFFECTIVE, MERGEKIT_PARAMETERS
from merge_cli.recipe.forms import NUMBER_AS_TEXT, any_of
from merge_cli.recipe.models import model_schema
from merge_cli.recipe.parse import RECIPE
from merge_cli.recipe.reader import Schema
from merge_cli.recipe.search import WITHOUT_SPACE
from merge_cli.recipe.sources import setting_schema
from merge_cli.recipe.statistics import unused_options

_GREEDY = "greedy_soup"  # the one method that searches without a space of parameters
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> Schema:
    """Of one document of a recipe."""
    definitions: dict[str, Schema] = {
        "model": model_schema(),
        "evaluation": EVALUATION.schema(),
        "objective": OBJECTIVE.schema(),
        **EVALUATION.task.define(),
        **OBJECTIVE.task.define(),
    }
    schema = RECIPE.schema()
    names = method_names()
    schema["properties"]["merge_method"] = {
        "enum": names,
        "enumDescriptions": [get_method(name).summary for name in names],
        "description": "how the models are merged",
    }
    branches = []
    for method in all_methods():
        definitions[f"method.{method.name}"] = _of_method(method, definitions)
        named = {"properties": {"merge_method": {"enum": [method.name, *method.aliases]}}}
        condition = {**named, "required": ["merge_method"]}
        branches.append({"if": condition, "then": {"$ref": f"#/$defs/method.{method.name}"}})
    return _document("A recipe of merge-cli", {**schema, "allOf": branches}, definitions)


def evaluation_schema() -> Schema:
    """Of an evaluation file."""
    title = "An evaluation file of merge-cli"
    return _document(title, EVALUATION.schema(), EVALUATION.task.define())


def objective_schema() -> Schema:
    """Of what stands under `objective:` in a recipe."""
    title = "An objective of merge-cli"
    return _document(title, OBJECTIVE.schema(), OBJECTIVE.task.define())


def _document(title: str, schema: Schema, definitions: dict[str, Schema]) -> Schema:
    return {"$schema": _DRAFT, "title": title, **schema, "$defs": definitions}


def _of_method(method: Method, definitions: dict[str, Schema]) -> Schema:
    """What a recipe of this method may hold, beyond what every recipe may."""
    name = f"parameters.{method.name}"
    for key, per_model in ((name, False), (f"{name}.model", True)):
        offered = _schemas(method, definitions, per_model=per_model)
        definitions[key] = _parameters(method, offered)
    shared, model = {"$ref": f"#/$defs/{name}"}, {"$ref": f"#/$defs/{name}.model"}
    source = {"properties": {"parameters": model}}
    listed = {"items": {"properties": {"parameters": model, **_data(method)}}}
    slices = {"items": {"properties": {"parameters": shared, "sources": {"items": source}}}}
    everywhere = {"parameters": shared, "models": listed, "slices": slices}
    modules = {"additionalProperties": {"properties": everywhere}}
    properties = {**everywhere, "modules": modules, **_sections(method)}
    result: Schema = {"properties": properties}
    if method.is_short_form:
        return {**result, "required": ["checkpoints"]}
    if method.searches:
        result["required"] = ["objective"] if method.name == _GREEDY else ["search", "objective"]
    elif method.needs_base:
        # A slice may have a base of its own, and adapters need none.
        keys = ("base_model", "slices", "modules", "output")
        result["anyOf"] = [{"required": [key]} for key in keys]
    return result


def _data(method: Method) -> dict[str, Any]:
    uses = method.learns or method.gathers or method.automatic or method.searches
    return {} if uses else {"data": False}


def _sections(method: Method) -> dict[str, Any]:
    """The sections that the method has no use for, and what is special in those that it has."""
    result: dict[str, Any] = {}
    if method.automatic:
        result |= {"parameters": False, "coefficients": False, "search": False, "objective": False}
        return {**result, **_statistics(method), "checkpoints": False, "schedule": False}
    if method.is_short_form:
        result |= {"models": False, "slices": False, "modules": False}
    else:
        result |= {"checkpoints": False, "schedule": False}
    result |= {"budget": False, "methods": False}
    if not method.learns:
        result["training"] = False
        if "coefficients" not in method.supplied:
            result["coefficients"] = False
    result |= _statistics(method)
    if not method.searches:
        result |= {"search": False, "objective": False}
    elif method.name == _GREEDY:
        result["search"] = {"propertyNames": {"enum": sorted(WITHOUT_SPACE)}}
    else:
        result["search"] = {"properties": _searched(), "required": list(_SPACE)}
    return result


def _statistics(method: Method) -> dict[str, Any]:
    """`statistics:`, which may name a folder where the method merges with them."""
    if method.gathers:
        unused = dict.fromkeys(unused_options(method.gathers), False)
        return {"statistics": {"properties": unused}}
    if method.searches:  # its rival is a fisher merge
        unused = dict.fromkeys(unused_options("fisher"), False)
        return {"statistics": {**_NO_FOLDER, "properties": unused}}
    return {"statistics": _NO_FOLDER if method.learns or method.automatic else False}


_NO_FOLDER: Schema = {"not": {"type": "string"}}
_SPACE = ("method",)  # what a search needs; most methods have default ranges


def _searched() -> Schema:
    """The methods that can be searched, and the parameters that any of them has."""
    names = {"enum": [name for name in method_names() if get_method(name).plain]}
    searchable = {p.name: {"description": p.doc} for p in _plain_parameters()}
    return {
        "method": any_of(names, {"type": "array", "items": names}),
        "parameters": {"properties": searchable, "propertyNames": {"enum": sorted(searchable)}},
    }


def _plain_parameters() -> Iterable[MethodParameter]:
    return (p for m in all_methods() if m.plain for p in m.parameters.values())


def _schemas(
    method: Method, definitions: dict[str, Schema], *, per_model: bool
) -> dict[str, Schema]:
    """The method's parameters that may stand under a model, or all of them."""
    if method.searches and method.name != _GREEDY:
        # Those of the methods that are searched, whichever they are.
        values = setting_schema({"type": ["boolean", "number", "string"]})
        definitions["setting.any"] = values
        some = (p for p in _plain_parameters() if p.per_model or not per_model)
        return {p.name: {"$ref": "#/$defs/setting.any", "description": p.doc} for p in some}
    if method.is_short_form:  # what is one value for each model comes from the schedule
        shared = (p for p in get_method(BECOMES).parameters.values() if not p.per_model)
        return {p.name: _parameter(p, definitions) for p in shared}
    parameters = method.parameters.values()
    return {p.name: _parameter(p, definitions) for p in parameters if p.per_model or not per_model}


def _parameters(method: Method, offered: dict[str, Schema]) -> Schema:
    """Parameters by name. Those of mergekit's other methods are passed by, and not offered."""
    passed = set(INEFFECTIVE)
    if not (method.learns or method.name == _GREEDY):
        passed |= MERGEKIT_PARAMETERS
    pattern = f"^({'|'.join(sorted(passed - set(offered)))})$"
    return {
        "type": "object",
        "properties": offered,
        "patternProperties": {pattern: {}},
        "additionalProperties": False,
    }


def _parameter(parameter: MethodParameter, definitions: dict[str, Schema]) -> Schema:
    """A reference to what may stand there, which many parameters share."""
    name = re.sub(r"[^a-z0-9.]+", "-", parameter.allowed.lower()).strip("-")
    if f"value.{name}" not in definitions:
        definitions[f"value.{name}"] = _value(parameter)
        value = {"$ref": f"#/$defs/value.{name}"}
        definitions[f"setting.{name}"] = setting_schema(value)
    result: Schema = {"$ref": f"#/$defs/setting.{name}", "description": parameter.doc}
    return result if parameter.default is None else {**result, "default": parameter.default}


def _value(parameter: MethodParameter) -> Schema:
    """One value of a parameter, as `MethodParameter.check` takes it."""
    truth = {"enum": [value for value in TRUTH if not isinstance(value, bool)]}
    if parameter.choices:
        choices = {"enum": list(parameter.choices)}
        return any_of(choices, truth) if _has_truth(parameter) else choices
    if parameter.kind is bool:
        return any_of({"type": "boolean"}, truth)
    if parameter.kind is str:
        return {"type": "string"}
    limits = parameter.range
    number: Schema = {"type": "integer" if parameter.kind is int else "number"}
    if limits.low is not None:
        number["exclusiveMinimum" if limits.above else "minimum"] = limits.low
    if limits.high is not None and not limits.capped:
        number["maximum"] = limits.high
    return any_of(number, NUMBER_AS_TEXT)


def _has_truth(parameter: MethodParameter) -> bool:
    return any(isinstance(choice, bool) for choice in parameter.choices)
