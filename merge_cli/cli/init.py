"""`merge-cli init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_cli.cli.options import QuietOption, complete_method, switch
from merge_cli.errors import UsageError
from merge_cli.system.shell import command

if TYPE_CHECKING:
    from merge_cli.console import Screen
    from merge_cli.console.questions import Questions
    from merge_cli.drafting.scaffold import ModelStudy, Scaffold


def init(
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="The model that the others are fine-tunes of."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="MODEL", help="A model to merge: a folder or a Hub id. Repeatable."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text that a model is good at, once for each --model, in order. Default: files "
            "that are called like the models, beside them or in a folder data.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Use this method instead of the proposed one.",
            autocompletion=complete_method,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the recipe to FILE; - is standard output."
        ),
    ] = Path("recipe.yaml"),
    yes: Annotated[bool, switch("--yes", "Do not ask questions.")] = False,
    overwrite: Annotated[bool, switch("--overwrite", "Replace an existing file.")] = False,
    headers_only: Annotated[
        bool, switch("--headers-only", "Read no weights, even of small models.")
    ] = False,
    schema: Annotated[
        bool,
        switch(
            "--schema/--no-schema",
            "Put the schema of recipes beside it, for completion in editors, or not.",
        ),
    ] = True,
    quiet: QuietOption = False,
) -> None:
    """Write a first recipe: inspect the models, propose a method and give the reasons."""
    from merge_cli import console, json_schema
    from merge_cli.drafting import scaffold as drafting
    from merge_cli.drafting.proposals import draftable

    screen = console.Screen(quiet=quiet)
    if method is not None:
        draftable(method)  # refuse other methods at once
    to_stdout = str(output) == "-"
    models = list(model or [])
    if models and not to_stdout:
        drafting.check_path(output, overwrite)
    questions = None
    if not models:
        questions = _questions(screen, yes or to_stdout)
        base = base or questions.base()
        models = questions.models(base)
    with screen.progress() as on_progress:
        study = drafting.study_models(
            base,
            models,
            data=data or (),
            read=not headers_only,
            results={}
            if to_stdout or questions is not None
            else drafting.result_files(output, schema=schema),
            on_progress=on_progress,
        )
    screen.notes(study.notes)
    if questions is None:
        scaffold = drafting.scaffold(study, output, method, schema=schema and not to_stdout)
    else:
        scaffold, output = _agreed(questions, study, output, method, overwrite, schema)
    if to_stdout:
        console.print_text(scaffold.text)
        return
    of_recipes = json_schema.recipe_schema() if schema else None
    drafting.write_scaffold(scaffold, output, overwrite, of_recipes)
    if not quiet:
        screen.out.print(f"[green]✓[/green] {scaffold.method}: {output}", soft_wrap=True)
        next_one = command("plan", output)
        screen.out.print(f"  next    {next_one}", soft_wrap=True, markup=False)


def _questions(screen: Screen, silent: bool) -> Questions:
    """The questions on the terminal.

    Raises:
        UsageError: there is no terminal, or no questions are allowed.
    """
    from merge_cli.console.questions import Questions
    from merge_cli.recipe.reference import parse_reference
    from merge_cli.sources.opening import open_source

    if silent or not sys.stdin.isatty():
        hint = "merge-cli init --base BASE --model A --model B"
        raise UsageError("--model is missing: name the models to merge", hint=hint)
    folder = Path.cwd()
    return Questions(screen.err, lambda name: open_source(parse_reference(name, folder), folder))


def _agreed(
    questions: Questions,
    study: ModelStudy,
    output: Path,
    method: str | None,
    overwrite: bool,
    schema: bool,
) -> tuple[Scaffold, Path]:
    """The recipe that the user accepts, and its path."""
    from merge_cli.drafting import scaffold as drafting
    from merge_cli.methods.registry import method_names

    proposed = study.advice.recipe.merge_method if study.advice.recipe else "soup"
    while True:
        try:
            chosen_method = method or questions.method(proposed, method_names())
            path = questions.path(output)
            drafting.check_path(path, overwrite)
            drafting.refuse_read(study, drafting.result_files(path, schema=schema))
            scaffold = drafting.scaffold(
                study, path, None if chosen_method == proposed else chosen_method, schema=schema
            )
        except UsageError as error:
            questions.say(error)
            method = None
            continue
        questions.show(scaffold.text)
        if questions.confirm("Write this? No: choose again"):
            return scaffold, path
        method = None
