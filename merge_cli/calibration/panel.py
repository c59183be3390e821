"""What the plan of a recipe that gathers statistics shows: data, cache, disk, memory, reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.system.machine import show_size
from merge_cli.system.terminal import print_wrapped

if TYPE_CHECKING:
    from merge_cli.calibration.plan import CalibrationPlan

_WORDS = {"gram": "matrices of layers' inputs", "fisher": "importances of weights"}


def statistics_json(kind: str) -> list[dict[str, Any]]:
    """Every option of `statistics:` that this kind of statistics has."""
    from merge_cli.recipe.statistics import Statistics, unused_options

    plain = Statistics()
    return [
        {"name": f.name, "default": getattr(plain, f.name), "doc": f.metadata["help"]}
        for f in fields(Statistics)
        if f.name not in unused_options(kind)
    ]


def print_statistics(out: Console, kind: str) -> None:
    """The same as text."""
    out.print("\nOptions of `statistics:` (docs/statistics.md), gathered before the merge.\n")
    for option in statistics_json(kind):
        default = "" if option["default"] is None else f" (default: {option['default']})"
        text = f"[bold]{option['name']}[/bold]: {escape(option['doc'] + default)}"
        print_wrapped(out, text, indent=2)


def calibration_json(decided: CalibrationPlan) -> dict[str, Any]:
    """The gathering plan as data, for `--json`."""
    from merge_cli.recipe.statistics import plain_statistics

    return {
        "kind": decided.kind,
        "dials": plain_statistics(decided.statistics, decided.kind),
        "sources": [
            {
                "model": part.source.label,
                "data": part.data,
                "rows": part.examples.rows,
                "duplicates": part.examples.duplicates,
                "examples": len(part.examples.items),
                "tokens": part.examples.tokens,
                "cached": part.cached is not None,
                "bytes": size,
            }
            for part, size in zip(decided.parts, decided.bytes, strict=True)
        ],
        "tensors": decided.tensors,
        "means": decided.means,
        "bytes_to_gather": decided.bytes_to_gather,
        "memory": decided.memory,
        "device": decided.device,
        "dtype": decided.dtype,
        "why": decided.why,
    }


def print_calibration(out: Console, decided: CalibrationPlan) -> None:
    """The same as text."""
    out.print()
    missing = len(decided.missing)
    todo = f"{missing} of {len(decided.parts)} models to run" if missing else "all cached"
    out.print(f"[bold]calibration before the merge[/bold] ({_WORDS[decided.kind]}): {todo}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "data"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "examples", "tokens", "statistics"):
        table.add_column(name, justify="right")
    for part, size in zip(decided.parts, decided.bytes, strict=True):
        at_most = "cached, " if part.cached is not None else "at most "
        table.add_row(
            escape(part.source.label),
            escape(", ".join(file.rpartition("/")[2] for file in part.data.split(", "))),
            f"{part.examples.rows:,}",
            f"{len(part.examples.items):,}",
            f"{part.examples.tokens:,}",
            at_most + show_size(size),
        )
    out.print(table)
    for part in decided.parts:
        if part.examples.duplicates:
            twice = f"{part.examples.duplicates:,} rows of {part.data} are duplicates; each counts"
            out.print(f"[yellow]![/yellow] {escape(twice)} once")
    rounds = ", or less in rounds" if decided.kind == "gram" else ""
    memory = f"{show_size(decided.memory)} for one model and its sums{rounds}; in {decided.dtype}"
    for label, text in (
        ("tensors", f"{decided.tensors:,} merged by them, {decided.means:,} by the plain mean"),
        ("disk", _disk(decided.bytes_to_gather)),
        (
            "memory",
            f"{memory} ({decided.why['dtype']}) on {_with_reason(decided.why['device'])}",
        ),
    ):
        out.print(f"[dim]{label}:[/dim] {escape(text)}")


def _disk(size: int) -> str:
    if not size:
        return "the cache does not grow"
    return f"the cache grows by at most {show_size(size)}"


def print_gathered(out: Console, calibrated: Mapping[str, Any]) -> None:
    """What a merge was made with: one line for each source."""
    for item in calibrated["sources"]:
        zero = f", {item['zero']:.1%} of its importances are 0" if "zero" in item else ""
        cached = ", gathered before" if item["from_cache"] else ""
        out.print(
            f"[green]✓[/green] calibrated on {item['tokens']:,} tokens in {item['examples']:,} "
            f"examples with {escape(item['model'])}{zero}{cached}",
            soft_wrap=True,
        )
    of = f"{calibrated['means']:,} of {calibrated['tensors']:,} merged tensors"
    if calibrated["means"]:
        out.print(f"  {of} had no statistics and are the plain mean")


def _with_reason(device: str) -> str:
    """`cpu: no CUDA device found` with the reason in parentheses."""
    name, _, reason = device.partition(": ")
    return f"{name} ({reason})" if reason else name
