"""`merge-cli analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from merge_cli.cli.options import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    SeedOption,
    ThreadsOption,
    switch,
)
from merge_cli.errors import UsageError


def analyze(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | MODEL",
            help="A recipe file (- reads standard input), or two or more models.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="The model that the others are fine-tunes of."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with heat maps to FILE.")
    ] = None,
    write_recipe: Annotated[
        Path | None,
        typer.Option("--write-recipe", metavar="FILE", help="Write the suggested recipe to FILE."),
    ] = None,
    layers: Annotated[bool, switch("--layers", "Show a row for each layer.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = "1.25GB",
    seed: SeedOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print no progress and no notes.", show_default=False),
    ] = False,
) -> None:
    """Compare models before a merge: similarity, conflicts and a suggested recipe."""
    from merge_cli import console
    from merge_cli.options import MergeOptions
    from merge_cli.planning.planner import load_recipe
    from merge_cli.sources.result_files import check_writable
    from merge_cli.system.machine import parse_size

    results = {"--html": html, "--write-recipe": write_recipe}
    check_writable(results)
    options = MergeOptions(
        device=device, threads=threads, max_memory=parse_size(max_memory, "--max-memory")
    )
    screen = console.Screen(quiet=quiet)
    selection: dict[str, Any] = {"base": base, "models": arguments}
    if base is None and _is_recipe(arguments):
        loaded = load_recipe(arguments[0])
        screen.notes(loaded.warnings)
        selection = {"recipe": loaded}

    from merge_cli.analysis.run import analyze as measure

    with screen.progress() as on_progress:
        analysis = measure(
            **selection, seed=seed, options=options, on_progress=on_progress, results=results
        )
    # Files first: whoever reads stdout may go before its end.
    if html is not None:
        from merge_cli.analysis.page import write_page

        write_page(analysis, html)
        screen.notes([f"page written to {html}"])
    if write_recipe is not None:
        from merge_cli.analysis.advised_recipe import write_recipe as write

        write(analysis, write_recipe)
        screen.notes([f"recipe written to {write_recipe}"])
    hint = write_recipe is None
    screen.analysis(analysis, layers=layers, as_json=as_json, recipe_hint=hint)


def _is_recipe(arguments: list[str]) -> bool:
    """Whether the arguments are one recipe instead of models.

    Raises:
        UsageError: a recipe among several arguments.
    """
    recipes = [
        argument
        for argument in arguments
        if argument == "-" or argument.endswith((".yaml", ".yml"))
    ]
    if not recipes:
        return len(arguments) == 1 and Path(arguments[0]).is_file()
    if len(arguments) > 1:
        raise UsageError(f"{recipes[0]} is a recipe: it names all the models by itself")
    return True
