"""Nodes to Recipe: every key is honoured or refused, and all problems are found in one pass.

Parameters are read for their shape only (scalar, gradient, filters); which ones a method has is
the business of `methods`, which reports through `Recipe.problem` so that both kinds of message
look the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge_cli.errors import Problem
from merge_cli.recipe.keys import INEFFECTIVE, RECIPE_KEYS, UNSUPPORTED, nearest
from merge_cli.recipe.learning import LearningSections
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.schema import DTYPES, Parameters, Recipe, SliceSpec, SourceSpec
from merge_cli.recipe.search import SEARCH_KEYS, Search, parse_search
from merge_cli.recipe.templates import AUTO, BUILT_IN, template_text
from merge_cli.recipe.tokenizer import parse_tokenizer
from merge_cli.recipe.values import Gradient, Parameter, Rule, Scalar, Setting


def parse_recipe(root: Node, file: str, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """Read one document.

    Returns:
        The recipe as far as it could be read (None if it has no shape at all) and every problem.
    """
    return _Parser(file, folder).recipe(root)


class _Parser(LearningSections):
    def __init__(self, file: str, folder: Path) -> None:
        self.file, self.folder = file, folder
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.places: dict[str, tuple[int, int]] = {}

    def recipe(self, root: Node) -> tuple[Recipe | None, list[Problem]]:
        if not isinstance(root.value, dict):
            self._add(root, "", "a recipe is a mapping of keys such as merge_method and models")
            return None, self.problems
        top = self._mapping(root, "", RECIPE_KEYS)
        method = self._word(top.get("merge_method"), "merge_method")
        if top.get("merge_method", root).value is None or "merge_method" not in root.value:
            self._add(root, "merge_method", "missing", "`merge-cli methods` lists them.")
        if ("models" in root.value) == ("slices" in root.value) and "modules" not in root.value:
            both = "models" in root.value
            what = "give either models or slices, not both" if both else "missing"
            self._add(root, "models", what, "" if both else "List the sources under `models:`.")
        seed = top.get("seed")
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
            parameters=self._parameters(top.get("parameters"), "parameters"),
            dtype=self._dtype(top.get("dtype"), "dtype"),
            out_dtype=self._dtype(top.get("out_dtype"), "out_dtype"),
            seed=self._integer(seed, "seed") if seed else 0,
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
            coefficients=self._word(top.get("coefficients"), "coefficients"),
            inputs={k: str(v) for k, v in self._plain_mapping(top.get("inputs"), "inputs").items()},
            metadata=self._plain_mapping(metadata, "metadata"),
            eval=top.get("eval"),
            search=self._search(top.get("search")),
            objective=top.get("objective"),
            file=self.file,
            folder=self.folder,
            places=self.places,
            warnings=tuple(self.warnings),
        )
        return recipe, self.problems

    def _source(self, node: Node, key: str, *, layers: bool) -> SourceSpec:
        if isinstance(node.value, str):
            if layers:
                self._add(node, f"{key}.layer_range", "missing", "Write [first, last + 1].")
            return SourceSpec(self._model(node, key) or ModelRef(""), key)
        known = ("model", "parameters", "layer_range" if layers else "data")
        fields = self._mapping(node, key, known)
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

    def _search(self, node: Node | None) -> Search | None:
        if node is None or node.value is None:
            return None
        return parse_search(
            self._mapping(node, "search", SEARCH_KEYS), "search",
            lambda at, key, what, hint: self._add(at, key, what, hint),
        )  # fmt: skip

    def _slice(self, node: Node, key: str) -> SliceSpec:
        fields = self._mapping(node, key, ("sources", "parameters"))
        sources = self._list(fields.get("sources"), f"{key}.sources")
        specs = tuple(
            self._source(source, f"{key}.sources[{i}]", layers=True)
            for i, source in enumerate(sources)
        )
        if not specs:
            self._add(node, f"{key}.sources", "missing or empty", "List at least one source.")
        spans = {b - a for s in specs if s.layer_range for a, b in [s.layer_range]}
        if len(spans) > 1:
            what = f"sources have different numbers of layers ({sorted(spans)})"
            self._add(node, f"{key}.sources", what)
        return SliceSpec(
            specs, key, self._parameters(fields.get("parameters"), f"{key}.parameters")
        )

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

    def _chat_template(self, node: Node | None) -> str | None:
        word = self._word(node, "chat_template")
        if word is None or word == AUTO or node is None:
            return word
        text = template_text(word, self.folder)
        if text is None:
            what = f"no template of that name, and no such file: {word}."
            self._add(node, "chat_template", what, f"Use auto, {', '.join(BUILT_IN)}, or Jinja.")
        return text

    def _layer_range(self, node: Node | None, key: str) -> tuple[int, int] | None:
        if node is None:
            return None
        values = node.plain()
        whole = isinstance(values, list) and all(type(v) is int for v in values)
        if not whole or len(values) != 2 or not 0 <= values[0] < values[1]:
            self._add(node, key, f"must be [first, last + 1] with 0 <= first < last (got {values})")
            return None
        return values[0], values[1]

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
                return float(value)
            except ValueError:
                return value
        self._add(node, key, f"must be a number, a word or true/false (got {node.plain()!r})")
        return None

    def _dtype(self, node: Node | None, key: str) -> str | None:
        word = self._word(node, key)
        if word is None or node is None:
            return None
        name = word.removeprefix("torch.")
        if name not in DTYPES:
            self._add(node, key, f"unknown dtype '{word}'.", nearest(name, DTYPES))
            return None
        return name

    def _word(self, node: Node | None, key: str) -> str | None:
        if node is None or node.value is None:
            return None
        if isinstance(node.value, str) and node.value:
            return node.value
        self._add(node, key, f"must be text (got {node.plain()!r})")
        return None

    def _integer(self, node: Node, key: str) -> int:
        if type(node.value) is int and node.value >= 0:
            return node.value
        self._add(node, key, f"must be a whole number of at least 0 (got {node.plain()!r})")
        return 0

    def _list(self, node: Node | None, key: str) -> list[Node]:
        if node is None:
            return []
        if isinstance(node.value, list) and node.value:
            return node.value
        self._add(node, key, f"must be a list of at least one (got {node.plain()!r})")
        return []

    def _plain_mapping(self, node: Node | None, key: str) -> dict[str, Any]:
        if node is None or node.value is None:
            return {}
        plain = node.plain()
        if not isinstance(plain, dict):
            self._add(node, key, "must be a mapping")
            return {}
        return plain

    def _mapping(self, node: Node, key: str, known: tuple[str, ...]) -> dict[str, Node]:
        """The known children of a mapping; unknown keys are problems, ineffective ones warnings."""
        if not isinstance(node.value, dict):
            self._add(node, key, f"must be a mapping (got {node.plain()!r})")
            return {}
        fields: dict[str, Node] = {}
        for name, child in node.value.items():
            path = f"{key}.{name}" if key else name
            self.places[path] = node.key_places[name]
            if name in known:
                fields[name] = child
            elif name in INEFFECTIVE:
                self._warn(node, name, path)
            elif not key and name in UNSUPPORTED:
                self.problems.append(self._at(path, f"{UNSUPPORTED[name]}."))
            else:
                self.problems.append(self._at(path, "unknown key.", nearest(name, known)))
        return fields

    def _warn(self, node: Node, name: str, path: str) -> None:
        line, column = node.key_places[name]
        place = f"{self.file}:{line}:{column}: {path}"
        self.warnings.append(f"{place}: has no effect ({INEFFECTIVE[name]}).")

    def _at(self, path: str, what: str, hint: str = "") -> Problem:
        line, column = self.places[path]
        return Problem(what, path, self.file, line, column, hint)

    def _add(self, node: Node, key: str, what: str, hint: str = "") -> None:
        self.problems.append(Problem(what, key, self.file, node.line, node.column, hint))
