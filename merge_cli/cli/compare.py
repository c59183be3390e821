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
    LimitOption,
    ModelDtypeOption,
    NoWorseOption,
    QuietOption,
    RayOption,
    ThreadsOption,
)


def compare(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE", help="The recipe files to compare.")
    ],
    eval_file: EvalOption = None,
    data: DataOption = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="Write merges and results to this folder."),
    ] = Path("comparison"),
    limit: LimitOption = None,
    gate: GateOption = None,
    no_worse: NoWorseOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    dtype: ModelDtypeOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge and evaluate several recipes, and compare them with base, sources and baselines."""
    from merge_cli import console
    from merge_cli.comparison.publish import compare as run_comparison
    from merge_cli.comparison.publish import comparison_spec

    spec = comparison_spec(recipes, eval_file, data or []).changed(
        device=device, dtype=dtype, threads=threads
    )
    spec = spec.limited(limit)
    options = ["--device", device, *(["--threads", str(threads)] if threads else [])]
    screen = console.Screen(quiet=quiet)
    with screen.steps() as on_progress:
        comparison = run_comparison(
            recipes,
            spec,
            out,
            gates=gate or [],
            no_worse=no_worse or [],
            options=[*options, *(["--quiet"] if quiet else [])],
            ray=ray,
            on_progress=on_progress,
        )
    if as_json:
        console.print_json(json.dumps(comparison.record, ensure_ascii=False))
    else:
        screen.comparison(comparison.record, out)
    comparison.require_gates()
