"""`merge-cli demo`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import DeviceOption, JsonOption, QuietOption, ThreadsOption, switch


def demo(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder to write. Must not exist, or give --overwrite."
        ),
    ] = Path("merge-demo"),
    open_page: Annotated[
        bool,
        typer.Option(
            "--open/--no-open",
            help="Do not open the report in a browser.",
            show_default=False,
        ),
    ] = True,
    overwrite: Annotated[
        bool, switch("--overwrite", "Replace what an earlier demo has left in OUT.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Try merge-cli: merge two tiny experts that come with it, and see what that gains."""
    from merge_cli import console
    from merge_cli.console.demo import INTRODUCTION, can_open_pages
    from merge_cli.demo.folder import check_folder
    from merge_cli.options import MergeOptions

    began = time.monotonic()
    check_folder(out, overwrite=overwrite)
    screen = console.Screen(quiet=quiet)
    screen.say(INTRODUCTION)
    screen.say("Merging, then asking each model 500 questions ...")
    from merge_cli.demo.run import run_demo  # after the lines: loading its libraries takes a while

    options = MergeOptions(device=device, threads=threads, overwrite=overwrite)
    with screen.steps() as on_progress:
        result = run_demo(out, options=options, overwrite=overwrite, on_evaluation=on_progress)
    if as_json:
        console.print_json(json.dumps(result.record, ensure_ascii=False))
    else:
        screen.demo(result, time.monotonic() - began)
    if open_page and can_open_pages():
        import webbrowser

        webbrowser.open(result.page.absolute().as_uri())
