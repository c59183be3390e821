"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="The recipe's file; - reads standard input.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", "--random-seed", help="Instead of the recipe's seed.", min=0)
]
ShardOption = Annotated[str, typer.Option(help="Bytes of tensors in one output file.")]
MemoryOption = Annotated[str, typer.Option(help="What the whole process should stay under.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", "--num-threads", "-j", min=1, help="Default: every usable core."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AllOption = Annotated[bool, typer.Option("--all", help="Show every tensor.")]


def switch(name: str, text: str) -> Any:
    """A flag that is off unless given, without a `--no-` twin."""
    return typer.Option(name, help=text, show_default=False)


def mergekit(text: str, *names: str) -> Any:
    """A flag of mergekit-yaml that is honoured."""
    return typer.Option(*names, help=text, rich_help_panel="mergekit's flags", show_default=False)


def unneeded(name: str) -> Any:
    """A flag of mergekit-yaml that is answered in one line (`mergekit_flags`)."""
    return typer.Option(f"--{name}/--no-{name}", hidden=True)
