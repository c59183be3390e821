"""Printing uploads of `merge-cli push`: what would be uploaded, and finished ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.recipe.reference import is_address
from merge_cli.system.machine import show_size
from merge_cli.system.terminal import print_wrapped

if TYPE_CHECKING:
    from merge_cli.publishing.package import Package
    from merge_cli.publishing.push import Pushed


def package_json(package: Package, repo: str, branch: str, public: bool) -> dict[str, Any]:
    """An upload before it starts, as data."""
    target: dict[str, Any] = {"repository": repo, "branch": branch, "private": not public}
    if is_address(repo):
        target = {"address": repo}
    return {
        **target,
        "files": package.files,
        "bytes": package.size,
        "card": package.card,
        "notes": list(package.notes),
    }


def print_package(console: Console, package: Package, repo: str, branch: str, public: bool) -> None:
    """Files with their sizes, and the card."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    for name, size in package.files.items():
        table.add_row(escape(name), show_size(size))
    where = f"{repo}, {_visibility(not public)}" + (f", branch {branch}" * (branch != "main"))
    where = repo if is_address(repo) else where
    console.print(f"[bold]dry run:[/bold] would upload to {escape(where)}\n")
    console.print(table)
    console.print(f"\n{len(package.files)} files, {show_size(package.size)}\n")
    console.print("[bold]README.md[/bold]\n")
    # A terminal wraps its lines between words, as whoever renders Markdown will.
    print_wrapped(console, escape(package.card))


def pushed_json(pushed: Pushed) -> dict[str, Any]:
    """A finished upload, as data."""
    if is_address(pushed.repo_id):
        address, removed = pushed.repo_id, list(pushed.removed)
        return {"address": address, "changed": pushed.changed, "files": pushed.files,
                "removed": removed}  # fmt: skip
    return {
        "repository": pushed.repo_id,
        "branch": pushed.branch,
        "url": pushed.url,
        "commit": pushed.commit,
        "private": pushed.private,
        "created": pushed.created,
        "changed": pushed.changed,
        "files": pushed.files,
        "removed": list(pushed.removed),
    }


def print_pushed(console: Console, pushed: Pushed) -> None:
    """A finished upload: repository, page, commit."""
    files = f"{len(pushed.files)} files, {show_size(sum(pushed.files.values()))}"
    done = f"pushed {files} to" if pushed.changed else f"nothing to do: all {files} are in"
    is_store = is_address(pushed.repo_id)
    where = pushed.repo_id if is_store else f"{pushed.repo_id} ({_visibility(pushed.private)})"
    console.print(f"[green]✓[/green] {done} {escape(where)}", soft_wrap=True)
    if pushed.removed:
        names = ", ".join(pushed.removed)
        console.print(f"  removed {escape(names)}: weights of the model before", soft_wrap=True)
    if not is_store:
        console.print(f"  page    {escape(pushed.url)}", soft_wrap=True)
        console.print(f"  commit  {pushed.commit}", soft_wrap=True)


def _visibility(private: bool) -> str:
    return "private" if private else "public"
