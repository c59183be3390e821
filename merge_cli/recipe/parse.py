"""Nodes to Recipe: every key is honoured or refused, and all problems are found in one pass.

Parameters are read for their shape only (scalar, gradient, filters); which ones a method has is
the business of `methods`, which reports through `Recipe.problem` so that both kinds of message
look the same.

Nodes to parameters: scalars, gradients, rules with filters (see values.py for what they mean).

Only their shape is read here; which parameters a method has is the business of `methods`.

Nodes to what is merged: models, slices of them, modules, and how either names a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from merge_cli.errors import Problem
from merge_cli.recipe.fields import (
    FP8,
    INEFFECTIVE,
    RECIPE_KEYS,
    SOURCE_KEYS,
    UNUSED_LAYER_RANGE,
    UNUSED_SEED,
    Fields,
)
from merge_cli.recipe.nodes import Node, without_empty
from merge_cli.recipe.output import parse_output
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.schema import ModuleSpec, Parameters, Recipe, SliceSpec, SourceSpec
from merge_cli.recipe.search import SEARCH_KEYS, Search, parse_search
from merge_cli.recipe.tokenizer import AUTO, BUILT_IN, parse_tokenizer, template_text
from merge_cli.recipe.training import LearningSections
from merge_cli.recipe.values import Gradient, Parameter, Rule, Scalar, Setting, filter_error


class ParameterSections(Fields):
    """The part of the recipe's parser that reads them."""

    def _parameters(self, node: Node | None, key: str) -> Parameters:
        if node is None or node.value is None:
            return {}
        if not isinstance(node.value, dict):
            self._add(node, key, "must be a mapping of parameters")
            return {}
        result: dict[str, Parameter] = {}
        for name, child in node.value.items():
            path = f"{key}.{name}"
            self.places[path] = node.key_places[name]
            if name in INEFFECTIVE:
                self._warn(node, name, path)
                continue
            setting = self._setting(child, path)
            if setting is not None:
                result[name] = Parameter(name, setting, path)
        return result

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


class ModelSections(ParameterSections, LearningSections):
    """The part of the recipe's parser that reads them."""

    def _source(self, node: Node, key: str, *, layers: bool) -> SourceSpec:
        if isinstance(node.value, str):
            if layers:
                self._add(node, f"{key}.layer_range", "missing", "Write [first, last + 1].")
            return SourceSpec(self._model(node, key) or ModelRef(""), key)
        known = ("model", "parameters", "layer_range", *(() if layers else ("data",)))
        fields = self._mapping(node, key, known)
        if not layers and "layer_range" in fields:
            self._ineffective(f"{key}.layer_range", UNUSED_LAYER_RANGE)
            del fields["layer_range"]
        model = self._model(fields.get("model"), f"{key}.model")
        named = fields.get("model")
        if isinstance(node.value, dict) and (named is None or named.value is None):
            self._add(node, f"{key}.model", "missing")
        if layers and isinstance(node.value, dict) and "layer_range" not in node.value:
            self._add(node, f"{key}.layer_range", "missing", "Write [first, last + 1].")
        return SourceSpec(
            model or ModelRef(""),
            key,
            self._parameters(fields.get("parameters"), f"{key}.parameters"),
            self._layer_range(fields.get("layer_range"), f"{key}.layer_range"),
            self._data(fields.get("data"), f"{key}.data"),
        )

    def _modules(self, node: Node | None) -> tuple[ModuleSpec, ...]:
        if node is None:
            return ()
        if not isinstance(node.value, dict) or not node.value:
            self._add(node, "modules", "must be a mapping of at least one module")
            return ()
        modules = []
        for name, child in node.value.items():
            key = f"modules.{name}"
            self.places[key] = node.key_places[name]
            modules.append(self._module(child, name, key))
        return tuple(modules)

    def _module(self, node: Node, name: str, key: str) -> ModuleSpec:
        node = without_empty(node)
        fields = self._mapping(node, key, ("models", "slices", "parameters"))
        if isinstance(node.value, dict) and ("models" in fields) == ("slices" in fields):
            self._add(node, key, "give either models or slices")
        shared = self._parameters(fields.get("parameters"), f"{key}.parameters")
        listed = tuple(
            self._source(one, f"{key}.models[{i}]", layers=False)
            for i, one in enumerate(self._list(fields.get("models"), f"{key}.models"))
        )
        pieces = tuple(
            self._slice(item, f"{key}.slices[{i}]", shared)
            for i, item in enumerate(self._list(fields.get("slices"), f"{key}.slices"))
        )
        whole = (SliceSpec(listed, f"{key}.models", {}, shared),) if listed else ()
        return ModuleSpec(name, key, whole or pieces, shared)

    def _slice(self, node: Node, key: str, outer: Parameters | None = None) -> SliceSpec:
        self.places[key] = (node.line, node.column)
        fields = self._mapping(node, key, ("sources", "parameters", "base_model"))
        sources = self._list(fields.get("sources"), f"{key}.sources")
        specs = tuple(
            self._source(source, f"{key}.sources[{i}]", layers=True)
            for i, source in enumerate(sources)
        )
        if not specs:
            self._add(node, f"{key}.sources", "missing or empty", "List at least one source.")
        spans = {b - a for s in specs if s.layer_range for a, b in [s.layer_range]}
        if len(spans) > 1:
            message = f"sources have different numbers of layers ({sorted(spans)})"
            self._add(node, f"{key}.sources", message)
        own = self._parameters(fields.get("parameters"), f"{key}.parameters")
        base = self._model(fields.get("base_model"), f"{key}.base_model")
        return SliceSpec(specs, key, own, outer or {}, base)

    def _model(self, node: Node | None, key: str) -> ModelRef | None:
        if node is None or node.value is None:
            return None
        if not isinstance(node.value, dict):
            word = self._word(node, key)
            return parse_reference(word, self.folder) if word else None
        if "model" in node.value:  # mergekit's long form: {model: {path, revision}, lora: {...}}
            fields = self._mapping(node, key, ("model", "lora"))
            base = self._model(fields.get("model"), f"{key}.model")
        else:
            fields = self._mapping(node, key, ("path", "revision", "lora"))
            path = self._word(fields.get("path"), f"{key}.path")
            if path is None:
                self._add(node, f"{key}.path", "missing")
            revision = self._word(fields.get("revision"), f"{key}.revision")
            base = ModelRef(path, revision) if path else None
        lora = self._model(fields.get("lora"), f"{key}.lora")
        if base is None or lora is None:
            return base
        return ModelRef(base.path, base.revision, lora.path, lora.revision)

    def _layer_range(self, node: Node | None, key: str) -> tuple[int, int] | None:
        if node is None:
            return None
        values = node.plain()
        whole = isinstance(values, list) and all(type(v) is int for v in values)
        if not whole or len(values) != 2 or not 0 <= values[0] < values[1]:
            self._add(node, key, f"must be [first, last + 1] with 0 <= first < last (got {values})")
            return None
        return values[0], values[1]


def parse_recipe(root: Node, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """Read one document.

    Returns:
        The recipe as far as it could be read (None if it has no shape at all) and every problem.
    """
    return _Parser(file, folder).recipe(root)


class _Parser(ModelSections):
    def recipe(self, root: Node) -> tuple[Recipe | None, list[Problem]]:
        if not isinstance(root.value, dict):
            self._add(root, "", "a recipe is a mapping of keys such as merge_method and models")
            return None, self.problems
        root = without_empty(root)
        top = self._mapping(root, "", RECIPE_KEYS)
        method = self._word(top.get("merge_method"), "merge_method")
        if top.get("merge_method", root).value is None or "merge_method" not in root.value:
            self._add(root, "merge_method", "missing", "`merge-cli methods` lists them.")
        given = [key for key in SOURCE_KEYS if key in root.value]
        if len(given) > 1:
            self._add(root, given[0], f"give either {' or '.join(given)}, not both")
        elif not given:
            self._add(root, "models", "missing", "List the sources under `models:`.")
        seed = self._seed(top)
        metadata = top.get("metadata")
        recipe = Recipe(
            merge_method=method or "",
            base_model=self._model(top.get("base_model"), "base_model"),
            models=tuple(
                self._source(node, f"models[{i}]", layers=False)
                for i, node in enumerate(self._list(top.get("models"), "models"))
            ),
            slices=tuple(
                self._slice(node, f"slices[{i}]")
                for i, node in enumerate(self._list(top.get("slices"), "slices"))
            ),
            modules=self._modules(top.get("modules")),
            parameters=self._parameters(top.get("parameters"), "parameters"),
            dtype=self._dtype(top.get("dtype"), "dtype"),
            out_dtype=self._dtype(top.get("out_dtype"), "out_dtype", (FP8,)),
            seed=seed,
            tokenizer=parse_tokenizer(
                top.get("tokenizer"),
                top.get("tokenizer_source"),
                self.folder,
                self._add,
                self.places,
            ),
            chat_template=self._chat_template(top.get("chat_template")),
            name=self._word(top.get("name"), "name"),
            training=self._training(top.get("training"), root),
            statistics=self._statistics(top.get("statistics")),
            coefficients=self._word(top.get("coefficients"), "coefficients"),
            inputs={k: str(v) for k, v in self._plain_mapping(top.get("inputs"), "inputs").items()},
            metadata=self._plain_mapping(metadata, "metadata"),
            eval=top.get("eval"),
            search=self._search(top.get("search")),
            objective=top.get("objective"),
            output=parse_output(top.get("output"), self._add),
            file=self.file,
            folder=self.folder,
            places=self.places,
            warnings=tuple(self.warnings),
        )
        return recipe, self.problems

    def _seed(self, top: Mapping[str, Node]) -> int:
        """`seed`; or `random_seed`, which stands in recipes that mergekit's users share."""
        given, other = top.get("seed"), top.get("random_seed")
        if other is not None and given is not None:
            self._ineffective("random_seed", UNUSED_SEED)
        if given is None and other is not None:
            return self._integer(other, "random_seed")
        return self._integer(given, "seed") if given is not None else 0

    def _search(self, node: Node | None) -> Search | None:
        if node is None or node.value is None:
            return None
        return parse_search(
            self._mapping(node, "search", SEARCH_KEYS),
            "search",
            lambda at, key, what, hint: self._add(at, key, what, hint),
        )

    def _chat_template(self, node: Node | None) -> str | None:
        word = self._word(node, "chat_template")
        if word is None or word == AUTO or node is None:
            return word
        text = template_text(word, self.folder)
        if text is None:
            message = f"no template of that name, and no such file: {word}."
            self._add(node, "chat_template", message, f"Use auto, {', '.join(BUILT_IN)}, or Jinja.")
        return text
