"""Progress of evaluations and comparisons: a bar in a terminal, a line for each step in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from merge_cli.evaluation.run import Step

_LOG_SECONDS = 10.0


@contextmanager
def step_bar(console: Console) -> Iterator[Callable[[Step], None]]:
    """One bar, for the task at hand; finished tasks leave no line."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task("", total=None)

        def show(step: Step) -> None:
            bar.update(
                row,
                description=escape(f"{step.model}: {step.task}"),
                total=step.total or None,
                completed=step.done,
            )

        yield show


class StepLog:
    """A line when a task begins, and every ten seconds while it lasts."""

    def __init__(self, console: Console) -> None:
        self._console, self._next = console, 0.0
        self._last: tuple[str, str] = ("", "")

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        this = (step.model, step.task)
        if this == self._last and now < self._next:
            return
        share = f", {step.done / step.total:.0%}" if step.total and step.done else ""
        self._console.print(escape(f"{step.model}: {step.task}{share}"))
        self._last, self._next = this, now + _LOG_SECONDS
