"""`merge-cli push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import JsonOption, QuietOption, switch


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a merged model.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    public: Annotated[
        bool, switch("--public", "Everybody may read it; without this it is private.")
    ] = False,
    branch: Annotated[
        str, typer.Option("--branch", "--revision", help="The branch; made if it does not exist.")
    ] = "main",
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="The commit's message.")
    ] = None,
    overwrite: Annotated[
        bool, switch("--overwrite", "Replace another model that is there.")
    ] = False,
    dry_run: Annotated[
        bool, switch("--dry-run", "Show files, sizes and the card; ask and touch nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Upload a merged model to the Hugging Face Hub, with its card; resumes when interrupted."""
    from merge_cli import console
    from merge_cli.console import uploads
    from merge_cli.publishing.package import pack
    from merge_cli.publishing.push import check_name
    from merge_cli.publishing.push import push as upload

    screen = console.Screen(quiet=quiet)
    check_name(repo)
    package = pack(out, repo)
    if dry_run:
        if as_json:
            console.print_json(json.dumps(uploads.package_json(package, repo, branch, public)))
        else:
            uploads.print_package(screen.out, package, repo, branch, public)
        screen.notes(package.notes)
        return
    screen.notes(package.notes)
    bars = screen.err.is_terminal and not quiet
    with screen.uploading(bars) as on_progress:
        pushed = upload(
            out,
            repo,
            public=public,
            branch=branch,
            message=message or "",
            overwrite=overwrite,
            bars=bars,
            on_progress=on_progress,
        )
    if as_json:
        console.print_json(json.dumps(uploads.pushed_json(pushed)))
    elif not quiet:
        uploads.print_pushed(screen.out, pushed)
