"""`statistics:` of a recipe whose method looks at examples first.

A mapping says how they are looked at; a text names the folder of what has been gathered before.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from merge_cli.recipe.forms import Text, any_of
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import Form, Reader, Schema
from merge_cli.recipe.sections import option, section_of

Kind = Literal["gram", "fisher"]
FOLDER = "statistics"  # of a result that brings its own
ORIGIN = "gathered_from"  # under `metadata:` of a resolved recipe: of each source, what and how


@dataclass(frozen=True)
class Statistics:
    """How each source is looked at. None is explained by the help."""

    examples: int | None = option(256, "examples of each source; null takes all of its data", 1)
    max_length: int = option(512, "tokens of an example; longer rows are cut into several", 2)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype that the models run in; sums are wider"
    )
    batch_tokens: int = option(4096, "tokens in one forward pass", 2)
    rounds: int | None = option(
        None, "passes over the data, each for some layers; default as few as memory allows", 1
    )
    targets: Literal["data", "sampled"] = option(
        "data", "labels: the data's own, or drawn from the model's predictions"
    )


def statistics_file(number: int) -> str:
    """A model's file in a folder of statistics, by its place in the recipe, from 0 on."""
    return f"{number + 1}.safetensors"


# What only one kind of statistics is made with.
_OF_ONE: dict[str, Kind] = {"batch_tokens": "gram", "rounds": "gram", "targets": "fisher"}


def unused_options(kind: str) -> tuple[str, ...]:
    """The options that have no effect on statistics of this kind."""
    return tuple(name for name, only in _OF_ONE.items() if only != kind)


def fitting_statistics(statistics: Statistics, kind: str) -> Statistics:
    """Without what has no effect on statistics of this kind."""
    defaults = Statistics()
    unused = {name: getattr(defaults, name) for name in unused_options(kind)}
    return replace(statistics, **unused)


def plain_statistics(statistics: Statistics, kind: str) -> dict[str, Any]:
    """Every option that has an effect, as YAML writes it; null where that is a choice."""
    unused = unused_options(kind)
    return {
        f.name: getattr(statistics, f.name)
        for f in fields(Statistics)
        if f.name not in unused and not (f.name == "rounds" and statistics.rounds is None)
    }


STATISTICS = section_of(Statistics, null=True)


class StatisticsForm(Form):
    """A `Statistics`, or a text: a folder."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        form = Text() if isinstance(node.value, str) else STATISTICS
        return form.read(node, key, reader)

    def schema(self) -> Schema:
        return any_of(Text().schema(), STATISTICS.schema())
