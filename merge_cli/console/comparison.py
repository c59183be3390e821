"""A comparison as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.report.comparison.table import legend, used


def print_comparison(console: Console, record: Mapping[str, Any]) -> None:
    """A row for each model; bold are the merges that no other one beats in quality and time."""
    heads, rows = used(record)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if i else "left", overflow="fold")
    roles = [model["role"] for model in record["models"]]
    for i, (row, role) in enumerate(zip(rows, roles, strict=True)):
        strong = row[0] in record["front"]
        cells = [escape(cell) for cell in row]
        if strong:
            cells[0] = f"[bold]{cells[0]}[/bold]"
        ends = i + 1 < len(roles) and role == "source" != roles[i + 1]
        table.add_row(*cells, style="dim" if role in ("base", "source") else "", end_section=ends)
    console.print(table)
    console.print()
    for line in legend(record):
        console.print(f"[dim]{escape(line)}[/dim]")
    if record["front"]:
        console.print("[dim]bold: no other merge is both better and faster[/dim]")
    for note in record["notes"]:
        console.print(f"[dim]note:[/dim] {escape(note)}")
