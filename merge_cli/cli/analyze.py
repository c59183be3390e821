"""merge-cli analyze: what models are like before they are merged."""

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
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | MODEL...",
            help="A recipe's file (- reads it), or models.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The model that the others were made from.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page with heat maps.")] = None,
    write_recipe: Annotated[
        Path | None, typer.Option("--write-recipe", help="Write the suggested recipe.")
    ] = None,
    layers: Annotated[bool, switch("--layers", "A row for each layer, too.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = "1.25GB",
    seed: SeedOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes.", show_default=False)
    ] = False,
) -> None:
    """Say how alike models are, where they conflict, and what that suggests; nothing is merged."""
    from merge_cli import console
    from merge_cli.engine.options import MergeOptions
    from merge_cli.planning.planner import load_recipe
    from merge_cli.system.machine import parse_size

    options = MergeOptions(
        device=device, threads=threads, max_memory=parse_size(max_memory, "--max-memory")
    )
    screen = console.Screen(quiet=quiet)
    named: dict[str, Any] = {"base": base, "models": what}
    if base is None and _is_recipe(what):
        loaded = load_recipe(what[0])
        screen.notes(loaded.warnings)
        named = {"recipe": loaded}

    from merge_cli.analysis.run import analyze as measure

    with screen.progress() as on_progress:
        analysis = measure(**named, seed=seed, options=options, on_progress=on_progress)
    screen.analysis(analysis, layers=layers, as_json=as_json)
    if html is not None:
        from merge_cli.analysis.page import write_page

        write_page(analysis, html)
        screen.notes([f"the page is in {html}"])
    if write_recipe is not None:
        from merge_cli.analysis.advice import write_recipe as write

        write(analysis, write_recipe)
        screen.notes([f"the recipe is in {write_recipe}"])


def _is_recipe(what: list[str]) -> bool:
    """Whether the arguments are one recipe rather than models.

    Raises:
        UsageError: a recipe among several arguments.
    """
    recipes = [item for item in what if item == "-" or item.endswith((".yaml", ".yml"))]
    if not recipes:
        return len(what) == 1 and Path(what[0]).is_file()
    if len(what) > 1:
        raise UsageError(f"{recipes[0]} is a recipe: it names all the models by itself")
    return True
