"""The sections of `merge_method: auto`: what may be spent, and which methods are tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_cli.recipe.forms import Texts
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Reader
from merge_cli.recipe.sections import option, section_of


@dataclass(frozen=True)
class Budget:
    """What all steps together may cost; None is no limit."""

    minutes: float | None = option(None, "of the clock, on this machine", 0)
    tokens: float | None = option(
        None, "that models read, to look at examples, to learn, and to be measured", 0
    )


def _budget(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    if not node.value:
        hint = "Write `budget: {minutes: 10}`."
        return reader.refuse(node, key, "give minutes, tokens, or both", hint)
    return Budget(**values) if len(values) == len(node.value) else REFUSED


BUDGET = section_of(Budget, _budget, minProperties=1)
METHODS = Texts("must be a method or a list of methods", distinct=True)
