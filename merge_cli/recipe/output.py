"""`output: adapter`: adapters are merged with one another, and the result is an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_cli.recipe.forms import Checked, any_of, finite
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import Form, Reader, Schema
from merge_cli.recipe.sections import option, section_of

ADAPTER, MODEL = "adapter", "model"


def _share(value: Any) -> tuple[Any, str]:
    number = None if isinstance(value, str) else finite(value)
    if number is not None and 0 < number <= 1:
        return number, ""
    return None, "must be a share above 0, up to 1"


_SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


@dataclass(frozen=True)
class AdapterOutput:
    """Where the merged changes are cut."""

    rank: int | None = option(None, "largest rank of a matrix; default the method's", 1)
    energy: float | None = option(
        None,
        "the share of a matrix's sum of squares to hold; default all that `rank` can",
        form=Checked(_share, _SHARE),
    )

    def plain(self) -> Any:
        """As YAML has it."""
        cut = {key: value for key, value in (("rank", self.rank), ("energy", self.energy)) if value}
        return {ADAPTER: cut} if cut else ADAPTER


_SECTION = section_of(AdapterOutput)


@dataclass(frozen=True)
class OutputForm(Form):
    """`model` (the default, read as None), `adapter`, or `adapter` with a rank or an energy."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if node.value == MODEL:
            return None
        if node.value == ADAPTER:
            return AdapterOutput()
        hint = "Write `output: adapter`, or `output: {adapter: {rank: 16}}`."
        if not isinstance(node.value, dict) or set(node.value) != {ADAPTER}:
            return reader.refuse_type(node, key, "must be adapter or model", hint)
        cut = node.value[ADAPTER]
        if not isinstance(cut.value, dict | None):
            return reader.refuse_type(cut, f"{key}.{ADAPTER}", "must be a mapping", hint)
        return (
            AdapterOutput() if cut.value is None else _SECTION.read(cut, f"{key}.{ADAPTER}", reader)
        )

    def schema(self) -> Schema:
        cut = {"properties": {ADAPTER: any_of(_SECTION.schema(), {"type": "null"})}}
        closed: Schema = {"required": [ADAPTER], "additionalProperties": False}
        return any_of({"enum": [ADAPTER, MODEL]}, {"type": "object", **cut, **closed})
