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
            metavar="MODEL",
            help="Pickled weights (a folder, a Hub id, one file), a GGUF file, or a folder with a "
            "distributed checkpoint (DCP). To write a GGUF file, any model.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder, or .gguf file, to write."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Write float32, bfloat16 or float16 (of GGUF and DCP), or q8_0 (to GGUF). "
            "Default: the model's own; bfloat16 if it is quantised.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Take config.json and tokenizer from this model: for GGUF, DCP and single files.",
        ),
    ] = None,
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
    """Convert pickled weights, GGUF or DCP to safetensors, or a model to GGUF.

    None of the model's code is run.
    """
    from merge_cli import console
    from merge_cli.conversion.run import convert as run
    from merge_cli.system.machine import parse_size, show_size

    screen = console.Screen(quiet=quiet)
    limit = parse_size(max_memory, "--max-memory") if max_memory else 0
    with screen.progress() as on_progress:
        converted = run(
            model,
            out,
            dtype=dtype or "",
            config=config or "",
            max_memory=limit,
            overwrite=overwrite,
            fresh=fresh,
            on_progress=on_progress,
        )
    screen.notes(list(converted.notes))
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
                    "notes": list(converted.notes),
                }
            )
        )
    elif not quiet:
        description = f"{converted.path}: {converted.tensors} tensors, {show_size(converted.bytes)}"
        screen.out.print(description, markup=False, highlight=False, soft_wrap=True)
