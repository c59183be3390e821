"""`merge-cli convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import JsonOption, QuietOption, switch


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The model with pickled weights: a folder or a Hub id."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Limit the process that opens a file. Default: twice the file's size and 1 GB.",
        ),
    ] = None,
    overwrite: Annotated[bool, switch("--overwrite", "Replace OUT.")] = False,
    fresh: Annotated[bool, switch("--fresh", "Discard unfinished work on OUT.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert pickled weights to safetensors, without running any code of the pickle."""
    from merge_cli import console
    from merge_cli.conversion.run import convert as run
    from merge_cli.system.machine import parse_size, show_size

    screen = console.Screen(quiet=quiet)
    limit = parse_size(max_memory, "--max-memory") if max_memory else 0
    with screen.progress() as show:
        converted = run(model, out, max_memory=limit, overwrite=overwrite, fresh=fresh, show=show)
    if converted.tied:
        screen.notes([f"not stored, because config.json ties them: {', '.join(converted.tied)}"])
    if converted.left_out:
        screen.notes([f"left out, because they are not tensors: {', '.join(converted.left_out)}"])
    if as_json:
        console.print_json(
            json.dumps(
                {
                    "path": str(converted.path),
                    "tensors": converted.tensors,
                    "bytes": converted.bytes,
                    "tied": list(converted.tied),
                    "left_out": list(converted.left_out),
                }
            )
        )
    elif not quiet:
        description = f"{converted.path}: {converted.tensors} tensors, {show_size(converted.bytes)}"
        screen.out.print(description, markup=False, highlight=False, soft_wrap=True)
