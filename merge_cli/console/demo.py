"""What `merge-cli demo` prints: the table of models, an answer of each, and one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.system.machine import show_seconds
from merge_cli.system.shell import command
from merge_cli.system.terminal import print_wrapped

if TYPE_CHECKING:
    from merge_cli.demo.run import Demo


INTRODUCTION = (
    "Three models of 0.17 million parameters turn numbers in words into digits. The base knows "
    "English, and a few numbers in German and French; german and french have each learned their "
    "language from there. The merge adds what both have learned to the base."
)


def print_demo(console: Console, demo: Demo, seconds: float) -> None:
    """The result of a demo."""
    from merge_cli.demo.folder import BASE, RECIPE
    from merge_cli.demo.run import verdict

    comparison = demo.comparison
    console.print("[bold]Right answers to numbers that no model was trained on[/bold]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for name in (*comparison.tasks, "mean"):
        table.add_column(escape(name), justify="right")
    columns = [
        {entry.name: comparison.scores[entry.name, task].value for entry in comparison.entries}
        for task in comparison.tasks
    ]
    columns.append({name: score.value for name, score in comparison.averages.items()})
    for entry in comparison.entries:
        cells = [_share(column, entry.name) for column in columns]
        table.add_row(escape(entry.name), *cells)
    console.print(table)
    console.print()
    for question, answers in demo.questions:
        listed = ", ".join(f"{name} {answer or 'nothing'}" for name, answer in answers.items())
        print_wrapped(console, f"[bold]{escape(question)}[/bold] {escape(listed)}")
    console.print()
    print_wrapped(console, f"[bold]{escape(verdict(demo))}[/bold]")
    console.print()
    files = {
        "model": demo.merged,
        "recipe": demo.out / RECIPE,
        "report": demo.page,
        "merge report": demo.merged / "merge_report.html",
    }
    for label, path in files.items():
        console.print(f"  {label:<14}{escape(str(path))}", soft_wrap=True)
    ask = command("chat", demo.merged, "--against", demo.out / BASE)
    console.print(f"  {'ask it':<14}{escape(ask)}", soft_wrap=True)
    console.print(f"[dim]{show_seconds(seconds)}[/dim]")


def can_open_pages(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody sits in front of a screen: a terminal, a display, no CI."""
    if environment.get("CI") or not sys.stdout.isatty():
        return False
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform == "darwin" or any(environment.get(name) for name in displays)


def _share(column: Mapping[str, float], name: str) -> str:
    """A share of right answers; the best is bold."""
    text = f"{100 * column[name]:.0f} %"
    return f"[bold green]{text}[/bold green]" if column[name] == max(column.values()) else text
