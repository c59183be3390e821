"""`merge-cli compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import (
    DataOption,
    DeviceOption,
    EvalOption,
    GateOption,
    JsonOption,
    NoWorseOption,
    QuietOption,
    ThreadsOption,
)


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipes to compare.")],
    eval_file: EvalOption = None,
    data: DataOption = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for merges and results.")
    ] = Path("comparison"),
    gate: GateOption = None,
    no_worse: NoWorseOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the evaluation: auto, float32, bfloat16, float16.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge several recipes, evaluate them beside base, parents and baselines, and compare."""
    from merge_cli import console
    from merge_cli.api import compare as run_comparison
    from merge_cli.api import comparison_spec

    spec = comparison_spec(recipes, eval_file, data or []).changed(
        device=device, dtype=dtype, threads=threads
    )
    options = ["--device", device, *(["--threads", str(threads)] if threads else [])]
    screen = console.Screen(quiet=quiet)
    with screen.steps() as on_progress:
        result = run_comparison(
            recipes,
            spec,
            out,
            gates=gate or [],
            no_worse=no_worse or [],
            options=[*options, *(["--quiet"] if quiet else [])],
            on_progress=on_progress,
        )
    if as_json:
        console.print_json(json.dumps(result.record, ensure_ascii=False))
    else:
        screen.comparison(result.record, out)
    result.require_gates()
