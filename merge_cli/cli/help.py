"""The layout of `--help`: every page fits 80 columns.

typer shows a column for a switch's negative form, one for all spellings of an option, and a type
that says `<bool>` beside every switch. Long names are then cut off. Here an option shows its first
spelling, a switch the form that changes something, and no type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

# Titles of the panels that several commands share.
RESOURCES = "Resources"
EVALUATION = "Evaluation"
MERGEKIT = "mergekit's flags"

# Names that people try, and the commands that they mean.
_GUESSES = {
    "merge": "run",
    "mergekit-yaml": "run",
    "validate": "plan",
    "check": "plan",
    "dry-run": "plan",
    "new": "init",
    "create": "init",
    "eval": "evaluate",
    "test": "evaluate",
    "inspect": "analyze",
    "analyse": "analyze",
    "diff": "analyze",
    "list": "methods",
    "upload": "push",
    "extract": "extract-lora",
    "lora": "extract-lora",
}


class HelpCommand(TyperCommand):
    """A command whose help is laid out as this module says."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _short_spellings(self.get_params(ctx)):
            super().format_help(ctx, formatter)


class HelpGroup(TyperGroup):
    """The list of commands, likewise. An unknown command names the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command.

        Raises:
            UsageError (of click): there is none of this name.
        """
        name = args[0] if args else ""
        if name in _GUESSES and self.get_command(ctx, name) is None:
            ctx.fail(f"No such command '{name}'. Did you mean '{_GUESSES[name]}'?")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _short_spellings(self.get_params(ctx)):
            super().format_help(ctx, formatter)


@contextmanager
def _short_spellings(params: list[Any]) -> Iterator[None]:
    """Options as the help shows them. They are put back, because the parser reads them, too."""
    options = [param for param in params if param.param_type_name == "option"]
    before = [(param.opts, param.secondary_opts, param.metavar) for param in options]
    for param in options:
        param.opts, param.secondary_opts = _spellings(param), []
        if param.is_flag:
            param.metavar = ""
    try:
        yield
    finally:
        for param, (names, negatives, metavar) in zip(options, before, strict=True):
            param.opts, param.secondary_opts, param.metavar = names, negatives, metavar


def _spellings(option: Any) -> list[str]:
    """The spellings that the help shows: a long one, and the short one if there is one."""
    long = next(name for name in option.opts if name.startswith("--"))
    if option.secondary_opts and option.default is True:
        long = option.secondary_opts[0]
    elif option.secondary_opts and option.default is None:
        long = long.replace("--", "--[no-]", 1)
    return [long, *(name for name in option.opts if not name.startswith("--"))]
