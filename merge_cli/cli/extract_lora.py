"""`merge-cli extract-lora`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import DeviceOption, JsonOption, QuietOption, switch


def extract_lora(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The fine-tune: a folder or a Hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="The model that it was fine-tuned from.")
    ],
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Largest rank of a factor. Default: 32."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Keep this share of a change's sum of squares, for example 0.95.",
        ),
    ] = None,
    embeddings: Annotated[bool, switch("--embeddings", "Write factors for embeddings.")] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILTER", help="Write factors for the matching layers only. Repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="FILTER", help="Leave the matching tensors out. Repeatable."),
    ] = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, switch("--overwrite", "Replace OUT.")] = False,
    fresh: Annotated[bool, switch("--fresh", "Discard unfinished work on OUT.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the change of a fine-tune as a LoRA adapter that PEFT can load."""
    from merge_cli import console
    from merge_cli.adapters.extract import extract_lora as extract
    from merge_cli.console.adapters import print_extracted

    screen = console.Screen(quiet=quiet)
    with screen.progress() as on_progress:
        extracted = extract(
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
    screen.notes(extracted.notes)
    if as_json:
        console.print_json(json.dumps(extracted.to_json(), ensure_ascii=False))
    elif not quiet:
        print_extracted(screen.out, extracted)
