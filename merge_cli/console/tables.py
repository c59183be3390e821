"""Tables and JSON documents for the terminal: the plan's rows, methods, fast printing.

`json` is slow when it indents, because it leaves its C code. A plan repeats the same few values for
every tensor, so that `indented` encodes each only once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, starmap
from json.encoder import encode_basestring
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from merge_cli.methods.method import Method
    from merge_cli.planning.plan import TensorTask

_GAP = "  "


def method_json(method: Method) -> dict[str, Any]:
    """A method as data, for `--json`."""
    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "summary": method.summary,
        "paper": method.paper,
        "needs_base": method.needs_base,
        "sources": list(method.count),
        "parameters": [
            {
                "name": p.name,
                "default": p.default,
                "per_model": p.per_model,
                "allowed": p.allowed,
                "doc": p.doc,
            }
            for p in method.parameters.values()
        ],
    }


class Settings:
    """The parameters of a plan as text, made once for tensors that share them.

    Attributes:
        everywhere: parameters that are the same for every merged tensor, by name.
    """

    def __init__(self, tasks: Sequence[TensorTask]) -> None:
        every = [*map(attrgetter("parameters"), tasks)]
        distinct = dict(zip(map(id, every), every, strict=True))
        words = {key: _in_words(parameters) for key, parameters in distinct.items()}
        merged = [words[key] for key, parameters in distinct.items() if parameters]
        first = merged[0] if merged else {}
        self.everywhere = {
            name: text for name, text in first.items() if all(m.get(name) == text for m in merged)
        }
        self._particular = {
            key: ", ".join(text for name, text in parts.items() if name not in self.everywhere)
            for key, parts in words.items()
        }
        self._exact = {key: repr(parameters) for key, parameters in distinct.items()}

    def rows(
        self, tasks: Sequence[TensorTask], every: bool
    ) -> Iterator[tuple[str, list[TensorTask]]]:
        """One row for each tensor, or for each run of layers with the same treatment."""
        if every:
            for task in tasks:
                yield task.name, [task]
            return
        layers = [list(group) for _, group in groupby(tasks, key=attrgetter("group"))]
        for _, run in groupby(layers, key=self._likeness):
            alike = list(run)
            first, last = alike[0][0].group, alike[-1][0].group
            label = first if first == last else f"{first} … {last.rpartition('.')[2]}"
            yield label, [task for layer in alike for task in layer]

    def particulars(self, tasks: Sequence[TensorTask]) -> str:
        """Parameters that only these tensors have; with counts where they differ."""
        parameters = map(id, map(attrgetter("parameters"), tasks))
        notes = map(attrgetter("note"), tasks)
        texts: Counter[str] = Counter()
        for (key, note), count in Counter(zip(parameters, notes, strict=True)).items():
            texts["; ".join(filter(None, (self._particular[key], note)))] += count
        if len(texts) == 1:
            return next(iter(texts))
        return "\n".join(f"{count}× {text or 'nothing else'}" for text, count in texts.items())

    def _likeness(self, layer: Sequence[TensorTask]) -> object:
        """A key that is equal for layers in one row of the table."""
        first = layer[0]
        if first.group == first.name:
            return first.name
        stack = first.group.rpartition(".")[0]
        parameters = map(id, map(attrgetter("parameters"), layer))
        treatment = attrgetter("shape", "dtype", "action", "note")
        return stack, [*map(treatment, layer)], [*map(self._exact.__getitem__, parameters)]


def plan_row(label: str, tasks: Sequence[TensorTask], settings: Settings) -> tuple[str, ...]:
    """The cells of a row, as text."""
    from merge_cli.planning.totals import element_count

    return (
        label,
        str(len(tasks)),
        f"{element_count(tasks):,}",
        ", ".join(dict.fromkeys(map(attrgetter("dtype"), tasks))),
        ", ".join(dict.fromkeys(map(attrgetter("action"), tasks))),
        settings.particulars(tasks),
    )


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def print_table(console: Console, table: Table, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in a table without lines.

    Rows that need no folding are written directly: rich takes a third of a millisecond for each,
    half a minute for a large model.
    """
    heads = [str(column.header) for column in table.columns]
    widths = [max(map(cell_len, cells)) for cells in zip(heads, *rows, strict=True)]
    plain = all(cell.isprintable() for row in rows for cell in row)
    if not plain or sum(widths) + len(_GAP) * (len(widths) - 1) > console.width:
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    for column, width in zip(table.columns, widths, strict=True):
        column.min_width = width
    console.print(table)
    right = [column.justify == "right" for column in table.columns]
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        console.file.write(_GAP.join(starmap(_padded, cells)) + "\n")


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def _in_words(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Resolved parameters as text, without derived ones (None)."""
    texts = {}
    for name, value in parameters.items():
        values = value if isinstance(value, list) else [value]
        if any(v is not None for v in values):
            text = " ".join(f"{v:.4g}" if type(v) is float else str(v).lower() for v in values)
            texts[name] = f"{name} {text}"
    return texts


def indented(document: Any) -> str:
    """`json.dumps(document, indent=1, ensure_ascii=False)` where every key is a string.

    A list or mapping that occurs more than once is encoded once for each depth.
    """
    return _Encoder().text(document, 1)


class _Encoder:
    def __init__(self) -> None:
        # By identity: the document keeps its parts alive.
        self._cache: dict[tuple[int, int], str] = {}

    def text(self, value: Any, depth: int) -> str:
        if isinstance(value, str):
            return encode_basestring(value)
        if not isinstance(value, dict | list | tuple) or not value:
            return json.dumps(value)
        key = id(value), depth
        cached = self._cache.get(key)
        if cached is None:
            cached = self._cache[key] = self._container(value, depth)
        return cached

    def _container(self, value: dict[str, Any] | Sequence[Any], depth: int) -> str:
        start, end = "\n" + " " * depth, "\n" + " " * (depth - 1)
        if isinstance(value, dict):
            parts = [f"{encode_basestring(k)}: {self.text(v, depth + 1)}" for k, v in value.items()]
            return "{" + start + f",{start}".join(parts) + end + "}"
        parts = [self.text(element, depth + 1) for element in value]
        return "[" + start + f",{start}".join(parts) + end + "]"
