"""`merge-cli extract-lora`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import JsonOption, QuietOption, switch


def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A fine-tune: a folder, a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[str, typer.Option(help="What it was fine-tuned from.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of every matrix, at most. Default: 32.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Of a matrix's sum of squares, the share to hold: 0.95."),
    ] = None,
    embeddings: Annotated[bool, switch("--embeddings", "Embeddings get factors, too.")] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Layers that get factors, by name or filter.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Tensors that stay out, by name or filter.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, switch("--overwrite", "Replace OUT.")] = False,
    fresh: Annotated[bool, switch("--fresh", "Throw away unfinished work on OUT.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write what a fine-tune has changed as a LoRA adapter, which PEFT loads onto its base."""
    from merge_cli import console
    from merge_cli.adapters.extract import extract_lora as extract
    from merge_cli.console.adapters import print_extracted

    screen = console.Screen(quiet=quiet)
    with screen.progress() as on_progress:
        result = extract(
            model,
            out,
            base=base,
            rank=rank,
            energy=energy,
            embeddings=embeddings,
            include=include or (),
            exclude=exclude or (),
            device=device,
            overwrite=overwrite,
            fresh=fresh,
            on_progress=on_progress,
        )
    screen.notes(result.notes)
    if as_json:
        console.print_json(json.dumps(result.to_json(), ensure_ascii=False))
    elif not quiet:
        print_extracted(screen.out, result)
