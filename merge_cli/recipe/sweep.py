"""The `sweep:` of a recipe: variants of it that differ in a few keys, merged in one pass.

    merge_method: checkpoint_average
    checkpoints: {from: runs/pretrain, last: 16}
    sweep:
      mean: {schedule: constant}
      decay: {schedule: minus_sqrt}
      short: {schedule: minus_sqrt, checkpoints: {last: 4}}

A variant is the recipe with the variant's keys. Where both have a mapping under a key, the
variant's is put over the recipe's; anything else takes its place. So each variant is a recipe like
any other, and its messages name the lines that it is made of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema

SWEEP = "sweep"
# What may differ. Models, tokenizer and dtype may not: the variants' tensors are read as one.
VARIED = {
    "checkpoints": (["object", "array"], "the variant's checkpoints, instead of the recipe's"),
    "schedule": (["string", "object"], "the variant's schedule, instead of the recipe's"),
    "parameters": (["object"], "the variant's parameters, instead of the recipe's"),
    "models": (["array"], "the recipe's models with the variant's own parameters"),
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_LEAST = 2  # one variant is a recipe


@dataclass(frozen=True)
class SweepForm(Form):
    """A mapping of names to mappings of the keys that may differ."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        variants = node.value
        if not isinstance(variants, dict) or len(variants) < _LEAST:
            example = "{mean: {schedule: constant}, decay: {schedule: minus_sqrt}}"
            message = "must be a mapping of two variants or more, by name"
            return reader.refuse(node, key, message, f"Write `sweep: {example}`.")
        for name, variant in variants.items():
            path = f"{key}.{name}"
            reader.positions[path] = node.key_positions[name]
            if not _NAME.fullmatch(name) or name.endswith((".partial", ".lock")):
                hint = "Use letters, digits, '.', '_' and '-'."
                reader.refuse_key(path, "cannot name a variant, since it becomes a folder.", hint)
            if not isinstance(variant.value, dict):
                reader.refuse(variant, path, f"must be a mapping of {', '.join(VARIED)}")
                continue
            for inner in variant.value:
                if inner not in VARIED:
                    reader.positions[f"{path}.{inner}"] = variant.key_positions[inner]
                    message = f"cannot differ between variants, only {', '.join(VARIED)} can."
                    reader.refuse_key(f"{path}.{inner}", message, nearest(inner, VARIED))
        return node if not reader.problems else REFUSED

    def schema(self) -> Schema:
        variant: Schema = {
            "type": "object",
            "properties": {
                key: {"type": types, "description": help} for key, (types, help) in VARIED.items()
            },
            "additionalProperties": False,
        }
        return {"type": "object", "additionalProperties": variant, "minProperties": _LEAST}


def has_sweep(root: Node) -> bool:
    """Whether a document has variants."""
    return isinstance(root.value, dict) and SWEEP in root.value


def variants_of(root: Node, reader: Reader) -> dict[str, Node]:
    """The documents of a sweep's variants, by name; empty where the section is refused."""
    section = root.value[SWEEP]
    reader.positions[SWEEP] = root.key_positions[SWEEP]
    if SweepForm().read(section, SWEEP, reader) is REFUSED:
        return {}
    shared = _without(root, SWEEP)
    return {name: _over(shared, variant) for name, variant in section.value.items()}


def _over(shared: Node, variant: Node) -> Node:
    """A mapping put over another one."""
    value, positions = dict(shared.value), dict(shared.key_positions)
    for key, node in variant.value.items():
        below = value.get(key)
        if below is not None and isinstance(below.value, dict) and isinstance(node.value, dict):
            node = _over(_without(below, *_replaced(node)), node)
        value[key] = node
        positions[key] = variant.key_positions[key]
    return replace(shared, value=value, key_positions=positions)


def _replaced(over: Node) -> tuple[str, ...]:
    """`steps` and `last` of a window exclude one another: either takes the other's place."""
    return ("steps", "last") if {"steps", "last"} & over.value.keys() else ()


def _without(node: Node, *keys: str) -> Node:
    value = {key: child for key, child in node.value.items() if key not in keys}
    return replace(node, value=value)
