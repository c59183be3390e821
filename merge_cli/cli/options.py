"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
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
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only errors.", show_default=False)
]
DataOption = Annotated[
    list[Path] | None, typer.Option("--data", help="Text to measure the loss on; may be repeated.")
]
EvalOption = Annotated[
    Path | None, typer.Option("--eval", help="An evaluation file with tasks (docs/evaluate.md).")
]
GateOption = Annotated[
    list[str] | None,
    typer.Option("--gate", help="Exit with 5 unless it holds: 'math.loss<=2.1'. May be repeated."),
]
NoWorseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require-no-worse-than",
        help="Exit with 5 if worse than a model: base:japanese.loss, or with a margin, +2%.",
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="Show every tensor.")]


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Methods whose names begin like that, with their summaries, for the shell."""
    from merge_cli.methods.registry import get_method, method_names

    names = [name for name in method_names() if name.startswith(incomplete)]
    return [(name, get_method(name).summary) for name in names]


def switch(name: str, text: str) -> Any:
    """A flag that is off by default; a flag of mergekit has its `--no-` form in the name."""
    return typer.Option(name, help=text, show_default=False)


def mergekit(text: str, *names: str) -> Any:
    """A flag of mergekit-yaml that works."""
    return typer.Option(*names, help=text, rich_help_panel="mergekit's flags", show_default=False)


def unneeded(name: str) -> Any:
    """A flag of mergekit-yaml without effect (`mergekit_flags`); None: not given."""
    return typer.Option(f"--{name}/--no-{name}", hidden=True)
