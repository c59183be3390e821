"""Printing extracted and merged adapters: how much of a change they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.console.tables import percent
from merge_cli.system.machine import show_size

if TYPE_CHECKING:
    from merge_cli.adapters.extracted import ExtractedAdapter

_WORST = 5


def print_extracted(console: Console, extracted: ExtractedAdapter) -> None:
    """A summary, what is left out, and the layers whose change is held least."""
    factored = [change for change in extracted.changes if change.rank is not None]
    size = _ranks(change.rank for change in factored if change.rank is not None)
    saved = sum(1 for change in extracted.changes if change.rank is None and not change.why)
    parts = [f"{len(factored)} matrices of {size}"] if factored else []
    parts += [f"{saved} tensor{'s' * (saved != 1)} saved in full"] if saved else []
    console.print(
        f"[green]✓[/green] {percent(extracted.share)} of the change's sum of squares in "
        f"{show_size(extracted.bytes)}, "
        f"{percent(extracted.bytes / extracted.model_bytes)} of the model: " + ", ".join(parts)
    )
    for why, (count, share) in extracted.left_out().items():
        tensors = f"{count} tensor{'s' * (count != 1)}"
        console.print(f"  left out: {tensors} ({escape(why)}), {percent(share)}")
    worst = sorted(factored, key=lambda change: (change.share, change.name))[:_WORST]
    if worst and worst[0].share < 0.999:
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        for column in ("least complete", "rank", "share of its change"):
            table.add_column(
                column, justify="left" if column == "least complete" else "right", overflow="fold"
            )
        for change in worst:
            table.add_row(escape(change.name), str(change.rank), percent(change.share))
        console.print(table)
    console.print(f"  adapter  {escape(str(extracted.path))}", soft_wrap=True)


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 8`, or `rank 2 to 8`; empty where there are none."""
    listed = sorted(set(ranks))
    if not listed:
        return ""
    return f"rank {listed[0]}" if len(listed) == 1 else f"rank {listed[0]} to {listed[-1]}"


def print_merged(console: Console, report: Mapping[str, Any], shown: Path) -> None:
    """A summary of merged adapters."""
    adapter = report["adapter"]
    size = _ranks(module["rank"] for module in adapter["modules"].values())
    console.print(
        f"[green]✓[/green] merged {len(report['inputs'])} adapters into "
        f"{show_size(adapter['bytes'])}: "
        + (f"{len(adapter['modules'])} modules of {size}, " if size else "no module changes, ")
        + f"{percent(adapter['share'])} of the merged change's sum of squares"
    )
    console.print(f"  adapter  {escape(str(shown))}", soft_wrap=True)
