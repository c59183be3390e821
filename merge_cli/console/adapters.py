"""What is said of adapters that were made here: how much of a change they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.system.machine import show_size

if TYPE_CHECKING:
    from merge_cli.adapters.extract import ExtractedAdapter, ModuleChange

_WORST = 5


def print_extracted(console: Console, found: ExtractedAdapter) -> None:
    """A line on the whole, the layers that are held worst, and what is left out."""
    factored = [change for change in found.changes if change.rank is not None]
    ranks = sorted({change.rank for change in factored if change.rank is not None})
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"
    whole = sum(1 for change in found.changes if change.rank is None and not change.why)
    parts = [f"{len(factored)} matrices of {size}"] if factored else []
    parts += [f"{whole} tensor{'s' * (whole != 1)} saved whole"] if whole else []
    console.print(
        f"[green]✓[/green] {_percent(found.share)} of the change's sum of squares in "
        f"{show_size(found.bytes)}, {_percent(found.bytes / found.model_bytes)} of the model: "
        + (", ".join(parts) or "nothing has changed")
    )
    left = _left_out(found.changes)
    for why, (count, share) in left.items():
        some = f"{count} tensor{'s' * (count != 1)}"
        console.print(f"  left out: {some} ({escape(why)}), {_percent(share)}")
    worst = sorted(factored, key=lambda change: (change.share, change.name))[:_WORST]
    if worst and worst[0].share < 0.999:
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        for column in ("held worst", "rank", "of its change"):
            table.add_column(
                column, justify="left" if column == "held worst" else "right", overflow="fold"
            )
        for change in worst:
            table.add_row(escape(change.name), str(change.rank), _percent(change.share))
        console.print(table)
    console.print(f"  adapter  {escape(str(found.path))}", soft_wrap=True)


def print_merged(console: Console, report: Mapping[str, Any], shown: Path) -> None:
    """What merging adapters has made."""
    about = report["adapter"]
    ranks = sorted({module["rank"] for module in about["modules"].values()})
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"
    console.print(
        f"[green]✓[/green] merged {len(report['inputs'])} adapters into "
        f"{show_size(about['bytes'])}: "
        + (f"{len(about['modules'])} modules of {size}, " if ranks else "no module changes, ")
        + f"{_percent(about['share'])} of the merged change's sum of squares"
    )
    console.print(f"  adapter  {escape(str(shown))}", soft_wrap=True)


def _left_out(changes: Sequence[ModuleChange]) -> dict[str, tuple[int, float]]:
    """Why, how many, and their share of the whole change."""
    total = sum(change.squares for change in changes)
    result: dict[str, tuple[int, float]] = {}
    for change in changes:
        if change.why:
            count, share = result.get(change.why, (0, 0.0))
            result[change.why] = (count + 1, share + change.squares / total)
    return result


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
