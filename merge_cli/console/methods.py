"""Merge methods: all of them in a table, or one with its parameters and an example."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from merge_cli.console.plain import PlainConsole
from merge_cli.console.tables import method_json
from merge_cli.methods.method import Method
from merge_cli.planning.preparation import preparation_for
from merge_cli.recipe.examples import example_recipe
from merge_cli.system.terminal import fold_comments


def print_methods(out: PlainConsole, methods: Sequence[Method]) -> None:
    """One row each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "also", "what it does", "paper"):
        table.add_column(name, overflow="fold")
    for method in methods:
        also = ", ".join(method.aliases)
        table.add_row(method.name, also, escape(method.summary), method.paper)
    out.print(table)
    out.print("\n[dim]merge-cli methods NAME explains one.[/dim]")


def explained_json(method: Method) -> dict[str, Any]:
    """What `print_method` says, as data."""
    result = method_json(method)
    preparation = preparation_for(method)
    if preparation is not None:
        result.update(preparation.options_json(method))
    example = example_recipe({method.name, *method.aliases})
    result["example"] = example[1] if example else None
    return result


def print_method(out: PlainConsole, method: Method) -> None:
    """What it does, its parameters with defaults and ranges, an example."""
    also = f" (also {', '.join(method.aliases)})" if method.aliases else ""
    out.print(f"[bold]{method.name}[/bold]{also} — {escape(method.summary)}")
    least, most = method.count
    many = f"exactly {least}" if least == most else f"{least} or more"
    needs = "a base model and " if method.needs_base else ""
    out.print(
        f"Needs {needs}{many} source{'s' * (least != 1 or most is None)}."
        + (f" Paper: {method.paper}." if method.paper else "")
    )
    for parameter in method.parameters.values():
        scope = "for each model" if parameter.per_model else "for the merge"
        default = "set by another parameter" if parameter.default is None else parameter.default
        default_text = str(default).lower() if isinstance(default, bool) else str(default)
        out.print(
            f"\n  [bold]{parameter.name}[/bold]: {escape(parameter.allowed)}; "
            f"{scope}; default {escape(default_text)}"
        )
        out.print(f"      {escape(parameter.doc)}")
    preparation = preparation_for(method)
    if preparation is not None:
        preparation.print_options(out, method)
    example = example_recipe({method.name, *method.aliases})
    if example:
        recipe = example[1].rstrip()
        if not out.soft_wrap:
            recipe = fold_comments(recipe, out.width - 2)
        out.print(f"\n[bold]Example[/bold] (configs/{example[0]})\n")
        shown = textwrap.indent(recipe, "  ")
        out.print(shown, markup=False, highlight=False, soft_wrap=True)
