"""`output: adapter`: adapters are merged with one another, and the result is an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node

ADAPTER, MODEL = "adapter", "model"
Refuse = Callable[[Node, str, str, str], None]  # node, key, what, hint


@dataclass(frozen=True)
class AdapterOutput:
    """Where the merged changes are cut.

    Attributes:
        rank: of every matrix at most; None leaves it to the method.
        energy: the share of a matrix's sum of squares to hold; None holds all that `rank` can.
    """

    rank: int | None = None
    energy: float | None = None

    def plain(self) -> Any:
        """As YAML has it."""
        cut = {key: value for key, value in (("rank", self.rank), ("energy", self.energy)) if value}
        return {ADAPTER: cut} if cut else ADAPTER


def parse_output(node: Node | None, refuse: Refuse) -> AdapterOutput | None:
    """`model` (the default), `adapter`, or `adapter` with a rank or an energy."""
    if node is None or node.value in (None, MODEL):
        return None
    if node.value == ADAPTER:
        return AdapterOutput()
    hint = "Write `output: adapter`, or `output: {adapter: {rank: 16}}`."
    if not isinstance(node.value, dict) or set(node.value) != {ADAPTER}:
        refuse(node, "output", f"must be adapter or model (got {node.plain()!r}).", hint)
        return None
    cut = node.value[ADAPTER]
    if cut.value is None:
        return AdapterOutput()
    if not isinstance(cut.value, dict):
        refuse(cut, "output.adapter", f"must be a mapping (got {cut.plain()!r}).", hint)
        return None
    found: dict[str, Any] = {}
    for key, item in cut.value.items():
        value, path = item.plain(), f"output.adapter.{key}"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "rank" and type(value) is int and value > 0:
            found[key] = value
        elif key == "energy" and number and 0 < value <= 1:
            found[key] = float(value)
        elif key in ("rank", "energy"):
            requested = (
                "a whole number of at least 1" if key == "rank" else "a share above 0, up to 1"
            )
            refuse(item, path, f"must be {requested} (got {value!r}).", "")
        else:
            refuse(item, path, f"unknown key '{key}'.", nearest(str(key), ("rank", "energy")))
    return AdapterOutput(**found)
