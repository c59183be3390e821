"""Nodes to what is merged: models, slices of them, and how either names a model."""

from __future__ import annotations

from merge_cli.recipe.learning import LearningSections
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.schema import SliceSpec, SourceSpec
from merge_cli.recipe.settings import ParameterSections


class ModelSections(ParameterSections, LearningSections):
    """The part of the recipe's parser that reads them."""

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

    def _layer_range(self, node: Node | None, key: str) -> tuple[int, int] | None:
        if node is None:
            return None
        values = node.plain()
        whole = isinstance(values, list) and all(type(v) is int for v in values)
        if not whole or len(values) != 2 or not 0 <= values[0] < values[1]:
            self._add(node, key, f"must be [first, last + 1] with 0 <= first < last (got {values})")
            return None
        return values[0], values[1]
