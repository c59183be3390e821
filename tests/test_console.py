"""What the console writes faster than the libraries would: it must be what they would write."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.console.indented import indented
from merge_cli.console.tables import print_table

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(documents)
def test_indented_is_json(document: Any) -> None:
    assert indented(document) == json.dumps(document, indent=1, ensure_ascii=False)


def test_indented_writes_what_is_shared_at_every_depth() -> None:
    shared = {"weight": [0.5, 1], "é": []}
    document = {"a": shared, "b": [shared, shared, (1, shared)], "c": {}}
    assert indented(document) == json.dumps(document, indent=1, ensure_ascii=False)


ROWS = [
    ("model.layers.0 … 3", "36", "1,024", "BF16", "merge", "weight 0.5 0.3"),
    ("[bold]no markup[/bold] :smile:", "1", "7", "F32, BF16", "copy, merge", ""),
    ("ünïcode.名前.weight", "1", "12,345,678", "BF16", "merge", "stored as BF16, F32"),
]
FOLDED = [("a" * 70, "1", "1", "BF16", "merge", "x " * 40)]
LINES = [("layers", "2", "2", "BF16", "merge", "1× this\n1× that")]
ODD = [("tab\tand \x1b[1mescape", "1", "1", "BF16", "merge", "")]


def a_table() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(("layers", "tensors", "parameters", "dtype", "action", "with")):
        table.add_column(head, overflow="fold", justify="right" if i in (1, 2) else "left")
    return table


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "rows", [ROWS, ROWS + FOLDED, ROWS + LINES, ROWS + ODD, []],
    ids=["plain", "folded", "lines", "odd", "none"],
)  # fmt: skip
def test_tables_are_what_rich_prints(rows: Sequence[tuple[str, ...]], terminal: bool) -> None:
    def console() -> Console:
        return Console(file=io.StringIO(), width=100, force_terminal=terminal, emoji=False,
                       soft_wrap=not terminal)  # fmt: skip

    ours, richs = console(), console()
    print_table(ours, a_table(), rows)
    table = a_table()
    for row in rows:
        table.add_row(*map(escape, row))
    richs.print(table)
    assert ours.file.getvalue() == richs.file.getvalue()  # type: ignore[attr-defined]
