"""Nodes to what is merged: models, slices of them, modules, and how either names a model."""

from __future__ import annotations

from merge_cli.recipe.keys import UNUSED_LAYER_RANGE
from merge_cli.recipe.learning import LearningSections
from merge_cli.recipe.nodes import Node, without_empty
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.schema import ModuleSpec, Parameters, SliceSpec, SourceSpec
from merge_cli.recipe.settings import ParameterSections


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
            self._slice(one, f"{key}.slices[{i}]", shared)
            for i, one in enumerate(self._list(fields.get("slices"), f"{key}.slices"))
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
            what = f"sources have different numbers of layers ({sorted(spans)})"
            self._add(node, f"{key}.sources", what)
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
