"""`merge-cli methods`: the merge methods, or one of them explained."""

from __future__ import annotations

from typing import Annotated

import typer

from merge_cli.cli.options import JsonOption, complete_method


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Explain this method: its parameters and an example recipe.",
            autocompletion=complete_method,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or explain one."""
    from merge_cli import console
    from merge_cli.methods.registry import all_methods, get_method

    screen = console.Screen()
    if name is None:
        screen.methods(all_methods(), as_json=as_json)
    else:
        screen.method(get_method(name), as_json=as_json)
