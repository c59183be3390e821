"""What the plan of an automatic merge shows, and the path that one has taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.auto.checks import METHODS
from merge_cli.recipe.automatic import Budget
from merge_cli.system.machine import show_seconds

if TYPE_CHECKING:
    from merge_cli.auto.plan import AutomaticPlan


def automatic_json(decided: AutomaticPlan) -> dict[str, Any]:
    """The path as data, for `--json`."""
    return {
        "steps": [
            {
                "step": step.name,
                "method": step.recipe.merge_method,
                "tokens": step.tokens + decided.validation_tokens,
            }
            for step in decided.steps
        ],
        "budget": {"minutes": decided.budget.minutes, "tokens": decided.budget.tokens},
        "datasets": [{"name": part.name, "rows": dict(part.counts)} for part in decided.parts],
        "validation_tokens": decided.validation_tokens,
        "test_tokens": decided.test_tokens,
    }


def print_automatic(out: Console, decided: AutomaticPlan) -> None:
    """The steps, what they read, and the rows that decide."""
    out.print()
    out.print(
        f"[bold]before the merge, {len(decided.steps)} steps[/bold] are tried, and the best on "
        "validation rows is merged"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", overflow="fold")
    table.add_column("tokens", justify="right")
    for step in decided.steps:
        table.add_row(escape(step.name), f"{step.tokens + decided.validation_tokens:,}")
    out.print(table)
    for part in decided.parts:
        rows = part.counts
        out.print(
            f"  {escape(part.name)}: {rows['train']:,} rows to learn from, "
            f"{rows['validation']:,} to choose by, {rows['test']:,} to judge by"
        )
    out.print(f"  budget: {budget_words(decided.budget)}")


def budget_words(budget: Budget) -> str:
    """What may be spent, in words."""
    limits = []
    if budget.minutes is not None:
        limits.append(f"{budget.minutes:g} minutes")
    if budget.tokens is not None:
        limits.append(f"{budget.tokens:,.0f} tokens")
    return " and ".join(limits) or "no limit"


def print_path(out: Console, auto: Mapping[str, Any]) -> None:
    """Each step with its loss and its cost, then the verdict in one sentence."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", overflow="fold")
    for name in ("validation loss", "seconds", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for line in auto["path"]:
        loss = "–" if line["loss"] is None else f"{line['loss']:.4f}"
        word = "best" if line["step"] == auto["best"] else "kept" if line["kept"] else line["note"]
        cost = (f"{line['seconds']:.1f}", f"{line['tokens']:,}")
        table.add_row(escape(line["step"]), loss, *cost, escape(word))
    out.print(table)
    cost = auto["cost"]
    out.print(
        f"{len(auto['path'])} steps, {show_seconds(cost['seconds'])}, {cost['tokens']:,} tokens; "
        f"{escape(auto['ended'])}"
    )
    mark = "[green]✓[/green]" if auto["verdict"]["better"] else "[bold]–[/bold]"
    out.print(f"{mark} {escape(auto['sentence'])}")


def options_json() -> dict[str, Any]:
    """The keys of `budget:` and the methods, as data."""
    options = {f.name: f.metadata["help"] for f in fields(Budget)}
    return {"budget": options, "methods": list(METHODS)}


def print_options(out: Console) -> None:
    """The same as text."""
    out.print("\nEvery model needs `data:`. `training:` and `statistics:` are those of dam,")
    out.print("fisher and regmean.")
    out.print("\n  [bold]methods[/bold]: the methods that are tried; default")
    out.print(f"      {', '.join(METHODS)}")
    for f in fields(Budget):
        out.print(f"\n  [bold]budget.{f.name}[/bold]: at least 0; default no limit")
        out.print(f"      {escape(f.metadata['help'])}")
