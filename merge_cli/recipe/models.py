"""How a recipe's keys name a model: as text (reference.py), or as a mapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_cli.recipe.forms import Text, any_of
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.sections import PASSED_BY, Key, Section

_REVISION = Key(Text(), "a branch, tag or commit of the Hub")


@dataclass(frozen=True)
class ModelForm(Form):
    """A model: text, or a mapping; `{model: {...}, lora: {...}}` is mergekit's long form."""

    message: str = "must be text"

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict):
            word = Text(message=self.message).read(node, key, reader)
            return word if word is REFUSED else parse_reference(word, reader.folder)
        return (_LONG if "model" in node.value else _SHORT).read(node, key, reader)

    def schema(self) -> Schema:
        return {"$ref": "#/$defs/model"}


def _long(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    return _with_lora(values.get("model"), values)


def _short(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    path = values.get("path")
    if path and values.get("gguf_file"):
        path = f"{path}/{values['gguf_file']}"
    return _with_lora(ModelRef(path, values.get("revision")) if path else None, values)


def _with_lora(base: ModelRef | None, values: dict[str, Any]) -> Any:
    lora = values.get("lora")
    if base is None or lora is None:
        return REFUSED if base is None else base
    return ModelRef(base.path, base.revision, lora.path, lora.revision)


MODEL = ModelForm()
_LORA = Key(MODEL, "an adapter that is applied to the model first")
_LONG = Section(
    {"model": Key(MODEL, "the model itself", required=True), "lora": _LORA}, _long, rules=PASSED_BY
)
_SHORT = Section(
    {
        "path": Key(Text(), "a folder, a file, an id on the Hub, or an address", required=True),
        "revision": _REVISION,
        "gguf_file": Key(Text(), "the GGUF file in it, as transformers calls it"),
        "lora": _LORA,
    },
    _short,
    rules=PASSED_BY,
)


def model_schema() -> Schema:
    """What `#/$defs/model` is: a model, wherever one is named."""
    text = {
        "type": "string",
        "minLength": 1,
        "description": "a folder, a file, a Hub id or an address: "
        "path-or-id[@revision][+lora[@revision]]",
    }
    return any_of(text, _SHORT.schema(), _LONG.schema())
