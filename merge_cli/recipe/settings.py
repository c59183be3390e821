"""Nodes to parameters: scalars, gradients, rules with filters (see values.py for what they mean).

Only their shape is read here; which parameters a method has is the business of `methods`.
"""

from __future__ import annotations

import math

from merge_cli.recipe.fields import Fields
from merge_cli.recipe.keys import INEFFECTIVE
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.schema import Parameters
from merge_cli.recipe.values import Gradient, Parameter, Rule, Scalar, Setting, filter_error


class ParameterSections(Fields):
    """The part of the recipe's parser that reads them."""

    def _parameters(self, node: Node | None, key: str) -> Parameters:
        if node is None or node.value is None:
            return {}
        if not isinstance(node.value, dict):
            self._add(node, key, "must be a mapping of parameters")
            return {}
        found: dict[str, Parameter] = {}
        for name, child in node.value.items():
            path = f"{key}.{name}"
            self.places[path] = node.key_places[name]
            if name in INEFFECTIVE:
                self._warn(node, name, path)
                continue
            setting = self._setting(child, path)
            if setting is not None:
                found[name] = Parameter(name, setting, path)
        return found

    def _setting(self, node: Node, key: str) -> Setting | None:
        if isinstance(node.value, dict):
            return self._rules([node], key)
        if not isinstance(node.value, list):
            return self._scalar(node, key)
        if not node.value:
            self._add(node, key, "an empty list has no value")
            return None
        if any(isinstance(child.value, dict) for child in node.value):
            return self._rules(node.value, key)
        values = [self._scalar(child, key) for child in node.value]
        return None if None in values else Gradient(tuple(v for v in values if v is not None))

    def _rules(self, nodes: list[Node], key: str) -> Setting | None:
        rules: list[Rule] = []
        for node in nodes:
            if not isinstance(node.value, dict):
                value = self._setting(node, key)
                word = None
            else:
                fields = self._mapping(node, key, ("filter", "value"))
                if "value" not in node.value:
                    self._add(node, f"{key}.value", "missing")
                    continue
                value = self._setting(fields["value"], f"{key}.value")
                word = self._word(fields.get("filter"), f"{key}.filter")
                if word and (wrong := filter_error(word)):
                    self._add(fields["filter"], f"{key}.filter", wrong)
                    continue
            if isinstance(value, tuple):
                self._add(node, key, "filters cannot be nested")
            elif value is not None:
                rules.append(Rule(word, value))
        return tuple(rules)

    def _scalar(self, node: Node, key: str) -> Scalar | None:
        value = node.value
        if isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            try:  # YAML 1.1 reads 1e-3 as text
                number = float(value)
            except ValueError:
                return value
            return number if math.isfinite(number) else value  # a word: `nan` is no number
        self._add(node, key, f"must be a number, a word or true/false (got {node.plain()!r})")
        return None
