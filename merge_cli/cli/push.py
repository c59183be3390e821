"""`merge-cli push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import JsonOption, QuietOption, switch


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the merged model.")],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="The repository on the Hub, owner/name; or an address, s3://..."
        ),
    ],
    public: Annotated[
        bool, switch("--public", "Let everybody read a new repository. Default: private.")
    ] = False,
    branch: Annotated[
        str,
        typer.Option(
            "--branch",
            "--revision",
            metavar="NAME",
            help="Push to this branch, and create it if needed (also --revision).",
        ),
    ] = "main",
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="The commit message.")
    ] = None,
    overwrite: Annotated[
        bool, switch("--overwrite", "Replace another model in the repository.")
    ] = False,
    dry_run: Annotated[
        bool, switch("--dry-run", "Show files, sizes and the model card; upload nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Upload a merged model and its card to the Hugging Face Hub, or to a store.

    Interrupted uploads resume.
    """
    from merge_cli import console
    from merge_cli.console import uploads
    from merge_cli.publishing.package import pack
    from merge_cli.publishing.push import check_name, refuse_hub_options
    from merge_cli.publishing.push import push as upload
    from merge_cli.recipe.reference import is_address

    screen = console.Screen(quiet=quiet)
    check_name(repo)
    if is_address(repo):
        refuse_hub_options(repo, public=public, branch=branch, message=message or "")
    package = pack(out, "" if is_address(repo) else repo)
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
