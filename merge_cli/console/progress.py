"""Showing progress: a bar in a terminal, a few plain lines in a batch log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape

from merge_cli.system.machine import show_size

if TYPE_CHECKING:
    from merge_cli.options import Progress

LOG_SECONDS = 10.0
_VERBS = {"analyze": "reading"}  # a stage -> the bar's text


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    class OfBytes(ProgressColumn):
        """A column for rows that are counted in bytes; steps have their own text."""

        def __init__(self, column: ProgressColumn) -> None:
            self._column = column
            super().__init__()

        def render(self, task: Task) -> RenderableType:
            return "" if task.fields.get("steps") else self._column.render(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        OfBytes(DownloadColumn()),
        OfBytes(TransferSpeedColumn()),
        OfBytes(TimeRemainingColumn()),
    )
    with RichProgress(*columns, console=console, transient=True) as bar:
        rows: dict[str, Any] = {}
        steps = StepsLine(bar)

        def show(progress: Progress) -> None:
            if not progress.total:
                bar.console.print(f"[dim]{escape(progress.note)}[/dim]")
                return
            if progress.note == "resumed":
                line = (
                    f"resuming: {show_size(progress.done)} of {show_size(progress.total)} are done"
                )
                bar.console.print(f"[dim]{line}[/dim]")
            if progress.unit != "bytes":
                steps.show(progress)
                return
            steps.clear()
            doing = _VERBS.get(progress.stage, "merging")
            key = f"{progress.stage} {progress.note}" if progress.stage == "fetch" else doing
            if key not in rows:
                rows[key] = bar.add_task(escape(key), total=progress.total)
            bar.update(rows[key], completed=progress.done)

        yield show


class ProgressLog:
    """Progress as lines: at the start, every ten seconds, at the end of each stage."""

    def __init__(self, console: Console) -> None:
        self._console, self._next = console, time.monotonic() + LOG_SECONDS

    def __call__(self, progress: Progress) -> None:
        if not progress.total:
            self._console.print(escape(progress.note))
            return
        now = time.monotonic()
        if now < self._next and progress.note != "resumed" and not _is_end(progress):
            return
        self._next = now + LOG_SECONDS
        if progress.unit != "bytes":
            self._console.print(escape(steps_text(progress)))
            return
        share = f"{progress.done / progress.total:.0%}"
        of = f"{show_size(progress.done)} of {show_size(progress.total)}"
        note = f" ({progress.note})" if progress.note else ""
        self._console.print(escape(f"{progress.stage}: {share}, {of}{note}"))


class StepsLine:
    """One live line above the bars, for stages that are not counted in bytes."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._row = bar, None

    def show(self, progress: Progress) -> None:
        text = escape(steps_text(progress))
        if self._row is None:
            self._row = self._bar.add_task(text, total=progress.total, steps=True)
        self._bar.update(self._row, description=text, total=progress.total, completed=progress.done)

    def clear(self) -> None:
        if self._row is not None:
            self._bar.remove_task(self._row)
            self._row = None


def steps_text(progress: Progress) -> str:
    """`train 120/400 steps: loss 0.41 ...`"""
    progress_text = f"{progress.stage} {progress.done:,}/{progress.total:,} {progress.unit}"
    return f"{progress_text}: {progress.note}" if progress.note else progress_text


def _is_end(progress: Progress) -> bool:
    """Whether it is the last step of a stage: any log has a line for it."""
    return progress.unit == "steps" and progress.done == progress.total
