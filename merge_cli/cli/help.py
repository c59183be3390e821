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

from merge_cli.cli.guesses import ALIASES, command_meant, option_meant
from merge_cli.system.paths import require_arguments, require_working_folder

# Titles of the panels that several commands share.
RESOURCES = "Resources"
EVALUATION = "Evaluation"
MERGEKIT = "mergekit's flags"
_WITHOUT_FILES = ("methods", "schema")  # commands that work wherever they are run


class HelpCommand(TyperCommand):
    """A command whose help is laid out as this module says.

    An unknown option names the nearest one.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse a command's arguments.

        Raises:
            UsageError (of click): what is given does not fit.
        """
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            wrong: Any = error
            # click's NoSuchOption, which some versions of typer vendor
            if hasattr(wrong, "option_name") and hasattr(wrong, "possibilities"):
                wrong.possibilities = None
                wrong.message = f"No such option: {wrong.option_name}.{self._hint(wrong)}"
            raise

    def _hint(self, error: Any) -> str:
        """What was meant by an option that does not exist."""
        shown: list[Any] = [p for p in self.params if not getattr(p, "hidden", False)]
        options = {name for param in shown for name in (*param.opts, *param.secondary_opts)}
        options |= {p.metavar for p in shown if p.param_type_name == "argument" and p.metavar}
        meant = option_meant(error.option_name, options)
        if meant and not meant.startswith("-"):
            return f" Write {meant} without a flag."
        return f" Did you mean '{meant}'?" if meant else ""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, if it can be told where its files are.

        Raises:
            UsageError: the working directory is gone, or a path is not text.
            RuntimeError: something has ended the program, which must not pass for success.
        """
        if self.name not in _WITHOUT_FILES:
            require_working_folder()
        require_arguments(ctx.params.values())
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit, in code that is not ours
            raise RuntimeError(f"the program was ended by {error!r}") from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _short_spellings(self.get_params(ctx)):
            super().format_help(ctx, formatter)


class HelpGroup(TyperGroup):
    """The list of commands, likewise. An unknown command names the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; a name that is obviously meant for one finds it, too.

        Raises:
            UsageError (of click): there is none of this name.
        """
        name, *rest = args
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            if name not in ALIASES:
                meant = command_meant(name, self.commands)
                hint = f" Did you mean '{meant}'?" if meant else ""
                ctx.fail(f"No such command '{name}'.{hint}")
            args = [ALIASES[name], *rest]
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
