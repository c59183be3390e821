"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from merge_cli.cli.help import EVALUATION, MERGEKIT, RESOURCES

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="The recipe file; - reads standard input.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "--random-seed",
        metavar="N",
        help="Override the recipe's seed (also --random-seed).",
        min=0,
    ),
]
ShardOption = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest size of an output weights file.")
]
MemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Keep the whole process under this much memory.",
        rich_help_panel=RESOURCES,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "--num-threads",
        "-j",
        metavar="N",
        min=1,
        help="Use N threads (also --num-threads). Default: one for each usable core.",
        rich_help_panel=RESOURCES,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Compute on auto, cpu, cuda or cuda:N; `plan` takes a size, too: cuda:80GB.",
        rich_help_panel=RESOURCES,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work among the nodes of this Ray cluster: HOST:PORT, or auto for "
        "RAY_ADDRESS or this machine's cluster.",
        rich_help_panel=RESOURCES,
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only.", show_default=False)
]
ModelDtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run models in auto, float32, bfloat16 or float16.",
        rich_help_panel=RESOURCES,
    ),
]
ModelMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Read larger models layer by layer. Default: the memory that is free.",
        rich_help_panel=RESOURCES,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Evaluate at most N rows of each task, a random sample.",
        min=1,
        rich_help_panel=EVALUATION,
    ),
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Measure the loss on this text. Repeatable.",
        rich_help_panel=EVALUATION,
    ),
]
EvalOption = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        help="Run the tasks of this evaluation file (docs/evaluate.md).",
        rich_help_panel=EVALUATION,
    ),
]
GateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="RULE",
        help="Exit with code 5 unless RULE holds: 'math.loss<=2.1'. Repeatable.",
        rich_help_panel=EVALUATION,
    ),
]
NoWorseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require-no-worse-than",
        metavar="RULE",
        help="Exit with code 5 if the model is worse than another one: "
        "base:japanese.loss, or with a margin, base:japanese.loss+2%. Repeatable.",
        rich_help_panel=EVALUATION,
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="Show every tensor.")]


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Methods whose names begin like that, with their summaries, for the shell."""
    from merge_cli.methods.registry import get_method, method_names

    names = [name for name in method_names() if name.startswith(incomplete)]
    return [(name, get_method(name).summary) for name in names]


def switch(name: str, text: str, panel: str | None = None) -> Any:
    """A flag that is off unless given; one of mergekit's has its `--no-` twin in the name."""
    return typer.Option(name, help=text, show_default=False, rich_help_panel=panel)


def mergekit(text: str, *names: str, metavar: str | None = None) -> Any:
    """A flag of mergekit-yaml that is honoured."""
    return typer.Option(
        *names, metavar=metavar, help=text, rich_help_panel=MERGEKIT, show_default=False
    )


def unneeded(name: str) -> Any:
    """A flag of mergekit-yaml without effect (`mergekit_flags`); None: not given."""
    return typer.Option(f"--{name}/--no-{name}", hidden=True)
