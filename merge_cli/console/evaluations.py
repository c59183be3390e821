"""Printing evaluations and comparisons: tables, and progress as a bar or as lines of a log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.comparison.tables import legend, used_columns
from merge_cli.console.progress import LOG_SECONDS

if TYPE_CHECKING:
    from merge_cli.options import Progress


Json = Mapping[str, Any]
_WIDE = 110  # columns of a terminal that shows a difference in the row of its model
_MERGING = "merging"  # the stage of a comparison in which another process shows its progress
_INTERVAL = re.compile(r" \([^()]* to [^()]*\)")
_DIGITS = 8  # of a number with its sign, or of one end of an interval


def print_evaluations(console: Console, models: Sequence[Json]) -> None:
    """A row for each metric of each task, models one below the other.

    Args:
        models: by `evaluation.summary`; the first is compared with the others.
    """
    several = len(models) > 1
    console.print(_narrow(models) if several and console.width < _WIDE else _wide(models))
    if several:
        first = escape(models[0]["model"])
        console.print(
            f"[dim]difference: {first} minus the other model; better: {first} is, by more than "
            "chance[/dim]"
        )
    for model in models:
        of = f"{model['model']}, " if several else ""
        for name, task in model["tasks"].items():
            for note in task["notes"]:
                console.print(f"[yellow]![/yellow] {escape(f'{of}{name}: {note}')}")
    for other in models[1:]:
        console.print(escape(_conclusion(models[0], other)), highlight=False)
    tasks = [task for model in models for task in model["tasks"].values()]
    costs = [task["cost"] for task in tasks if not task["cached"]]
    tokens, seconds = (sum(cost[key] for cost in costs) for key in ("tokens", "seconds"))
    parts = [f"{tokens:,} tokens in {seconds:.1f} s"] if costs else []
    if len(costs) < len(tasks):
        parts.append(f"{len(tasks) - len(costs)} of {len(tasks)} results from the cache")
    parts += [models[0]["dtype"], models[0]["device"]]
    console.print(f"[dim]{', '.join(parts)}[/dim]")


def _table(heads: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without lines. A narrow terminal folds cells, but no number."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in heads:
        table.add_column(escape(name), overflow="fold")
    for name in numbers:
        table.add_column(escape(name), justify="right", overflow="fold", min_width=_DIGITS)
    return table


def _wide(models: Sequence[Json]) -> Table:
    """A row for each metric and model, with the difference in the same row."""
    several = len(models) > 1
    numbers = ["value", "95 % interval", *(["difference", "95 % interval"] if several else [])]
    table = _table(["task", "metric", *(["model"] if several else [])], numbers)
    if several:
        table.add_column("", overflow="fold")
    table.add_column("unit", overflow="fold")
    table.add_column("examples", justify="right", overflow="fold", min_width=len("examples"))
    for task, metric, results in _metrics(models):
        for i, (model, row) in enumerate(zip(models, results, strict=True)):
            label = [escape(model["model"])] if several else []
            cells = [_number(row["value"]), _interval(row["interval"])]
            if several:
                cells += _difference(row)
            start = [escape(task["name"]), escape(metric)] if i == 0 else ["", ""]
            trailing = [row["unit"], str(task["examples"])] if i == 0 else ["", ""]
            table.add_row(*start, *label, *cells, *trailing)
    return table


def _narrow(models: Sequence[Json]) -> Table:
    """A row for each metric and model, and one for each difference; without units."""
    table = _table(["task", "metric", "model"], ["value", "95 % interval"])
    table.columns[-1].no_wrap = table.columns[-2].no_wrap = True
    table.add_column("examples", justify="right", min_width=len("examples"))
    for task, metric, results in _metrics(models):
        start, examples = [escape(task["name"]), escape(metric)], str(task["examples"])
        for model, row in zip(models, results, strict=True):
            value = [_number(row["value"]), _interval(row["interval"])]
            table.add_row(*start, escape(model["model"]), *value, examples)
            start, examples = ["", ""], ""
            if "difference" in row:
                *difference, conclusion = _difference(row)
                table.add_row("", "", "[dim]difference[/dim]", *difference, conclusion)
    return table


def _metrics(models: Sequence[Json]) -> Iterator[tuple[Json, str, list[Json]]]:
    """Each task with its name, each of its metrics, and the models' results."""
    for name, task in models[0]["tasks"].items():
        for metric in task["metrics"]:
            results = [model["tasks"][name]["metrics"][metric] for model in models]
            yield {**task, "name": name}, metric, results


def _difference(row: Json) -> list[str]:
    """The difference from the first model, its interval, and a conclusion."""
    if "difference" not in row:
        return ["", "", ""]
    bounds = row["difference_interval"]
    words = {"better": "[green]better[/green]", "worse": "[red]worse[/red]"}
    conclusion = "" if bounds is None else words.get(_direction(row), "[dim]may be chance[/dim]")
    return [_number(row["difference"], "+"), _interval(bounds, "+"), conclusion]


def _conclusion(first: Json, other: Json) -> str:
    """Where the first model is better than another, in one sentence: by each task's main metric."""
    by_direction: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for name, task in other["tasks"].items():
        row = task["metrics"][next(iter(task["metrics"]))]
        if "difference" in row:
            by_direction[_direction(row)].append(name)
    parts = [
        *([f"better on {', '.join(by_direction['better'])}"] if by_direction["better"] else []),
        *([f"worse on {', '.join(by_direction['worse'])}"] if by_direction["worse"] else []),
        *(
            [f"no more than chance apart on {', '.join(by_direction[''])}"]
            if by_direction[""]
            else []
        ),
    ]
    return f"{first['model']} against {other['model']}: {'; '.join(parts)}."


def _direction(row: Json) -> str:
    """Whether the first model is better or worse by more than chance; empty where neither."""
    bounds = row["difference_interval"]
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return ""
    # The first model's value minus this one's.
    return "better" if (bounds[1] < 0) == (row["better"] == "lower") else "worse"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:  # an infinite perplexity
        return "∞"
    return f"{value:{sign}.4g}".replace("-", "−")


def _interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    return "–" if bounds is None else f"{_number(bounds[0], sign)} … {_number(bounds[1], sign)}"


def print_comparison(console: Console, record: Mapping[str, Any]) -> None:
    """A row for each model; merges on the Pareto front are bold."""
    heads, rows = used_columns(record)
    # A narrow terminal gets no intervals. The files have them.
    widths = [max(map(cell_len, cells)) for cells in zip(heads, *rows, strict=True)]
    shortened = sum(widths) + 2 * len(widths) > console.width
    if shortened:
        rows = [[name, *(_INTERVAL.sub("", cell) for cell in cells)] for name, *cells in rows]
    table = _comparison_table(heads, rows, console.width)
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
    if shortened:
        console.print("[dim]intervals: in a wider terminal, and in the files[/dim]")
    for note in record["notes"]:
        console.print(f"[dim]note:[/dim] {escape(note)}")
    if record["verdict"]:
        console.print(f"\n{escape(record['verdict']['text'])}", highlight=False)


def _comparison_table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """An empty table. In a narrow terminal heads and names fold between words, numbers nowhere."""
    cells = [max((cell_len(row[i]) for row in rows), default=0) for i in range(len(heads))]
    whole = sum(map(max, map(cell_len, heads), cells)) + 2 * len(heads)
    if whole > width:
        # A head that is wider than its numbers has its words one below the other.
        heads = [
            head.replace(" ", "\n") if cell_len(head) > size else head
            for head, size in zip(heads, cells, strict=True)
        ]
    sizes = [max(size, *map(cell_len, h.split("\n"))) for h, size in zip(heads, cells, strict=True)]
    words = [word for name, *_ in [heads, *rows] for word in name.split()]
    fits = sum(sizes[1:]) + 2 * len(sizes) + max(map(cell_len, words), default=0) <= width
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        justify: Literal["left", "right"] = "right" if i else "left"
        table.add_column(escape(head), justify=justify, overflow="fold", no_wrap=bool(i) and fits)
    return table


@contextmanager
def step_bar(console: Console) -> Iterator[Callable[[Progress], None]]:
    """One bar, for the task at hand; finished tasks leave no line."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as bar:
        row = bar.add_task("loading", total=None)

        def show(progress: Progress) -> None:
            if progress.stage == _MERGING:
                if bar.live.is_started:
                    bar.stop()
                console.print(f"[dim]{escape(progress.model)}: merging[/dim]")
                return
            bar.start()
            bar.update(
                row,
                description=escape(f"{progress.model}: {progress.stage}"),
                total=progress.total or None,
                completed=progress.done,
            )

        yield show


class StepLog:
    """A line when a task begins, and every ten seconds until it ends."""

    def __init__(self, console: Console) -> None:
        self._console, self._next = console, 0.0
        self._last: tuple[str, str] = ("", "")

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        this = (progress.model, progress.stage)
        if this == self._last and now < self._next:
            return
        share = (
            f", {progress.done / progress.total:.0%}" if progress.total and progress.done else ""
        )
        self._console.print(escape(f"{progress.model}: {progress.stage}{share}"))
        self._last, self._next = this, now + LOG_SECONDS
