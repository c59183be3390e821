"""`merge-cli init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli.options import QuietOption, complete_method, switch
from merge_cli.errors import UsageError

if TYPE_CHECKING:
    from merge_cli.console import Screen
    from merge_cli.console.questions import Questions
    from merge_cli.drafting.scaffold import ModelStudy, Scaffold


def init(
    base: Annotated[
        str | None, typer.Option("--base", help="The model that the others were made from.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model to merge; may be repeated.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="Instead of the one that is proposed.", autocompletion=complete_method
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The recipe's file; - is standard output.")
    ] = Path("recipe.yaml"),
    yes: Annotated[bool, switch("--yes", "Ask nothing.")] = False,
    overwrite: Annotated[bool, switch("--overwrite", "Replace an existing file.")] = False,
    headers_only: Annotated[
        bool, switch("--headers-only", "Do not read weights, however small they are.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a first recipe: look at the models, propose a method, say why."""
    from merge_cli import console
    from merge_cli.drafting import scaffold as drafting
    from merge_cli.drafting.scaffold import draftable

    screen = console.Screen(quiet=quiet)
    if method is not None:
        draftable(method)  # what cannot be is answered at once
    printed = str(output) == "-"
    models = list(model or [])
    if models and not printed:
        drafting.check_path(output, overwrite)
    ask = None
    if not models:
        ask = _questions(screen, yes or printed)
        base = base or ask.base()
        models = ask.models(base)
    with screen.progress() as show:
        result = drafting.study_models(base, models, read=not headers_only, show=show)
    screen.notes(result.notes)
    if ask is None:
        written = drafting.scaffold(result, output, method)
    else:
        written, output = _settled(ask, result, output, method, overwrite)
    if printed:
        console.print_text(written.text)
        return
    drafting.write_scaffold(written, output, overwrite)
    if not quiet:
        screen.out.print(f"[green]✓[/green] {written.method}: {output}", soft_wrap=True)
        screen.out.print(f"  next    merge-cli plan {output}", soft_wrap=True)


def _questions(screen: Screen, silent: bool) -> Questions:
    """Who asks for models.

    Raises:
        UsageError: nobody is there to answer.
    """
    from merge_cli.console.questions import Questions
    from merge_cli.recipe.reference import parse_reference
    from merge_cli.sources.source import open_source

    if silent or not sys.stdin.isatty():
        hint = "merge-cli init --base BASE --model A --model B"
        raise UsageError("which models? --model is missing", hint=hint)
    here = Path.cwd()
    return Questions(screen.err, lambda name: open_source(parse_reference(name, here), here))


def _settled(
    ask: Questions, found: ModelStudy, output: Path, method: str | None, overwrite: bool
) -> tuple[Scaffold, Path]:
    """The recipe that the user agrees to, and where it goes."""
    from merge_cli.drafting import scaffold as drafting
    from merge_cli.methods.registry import method_names

    proposed = found.advice.recipe.merge_method if found.advice.recipe else "soup"
    while True:
        try:
            chosen = method or ask.method(proposed, method_names())
            place = ask.path(output)
            drafting.check_path(place, overwrite)
            written = drafting.scaffold(found, place, None if chosen == proposed else chosen)
        except UsageError as error:
            ask.say(error)
            method = None
            continue
        ask.show(written.text)
        if ask.confirm("Write this? No: choose again"):
            return written, place
        method = None
