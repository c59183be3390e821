"""A page of every command with its arguments and options, from the command line itself."""

from __future__ import annotations

from typing import Any

import typer

from merge_cli.cli import app


def command_page() -> str:
    """The Markdown of the page."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "Exit codes: 0 done; 1 unexpected error; 2 a mistake in the recipe or the command; 3 an "
        "input model or data file; 4 disk, memory or device; 5 a quality gate; 130 interrupted. "
        "After an interruption the same command resumes ([more](running.md)).",
        "",
    ]
    for name in group.commands:
        command = group.commands[name]
        lines += [
            f"## merge-cli {name}",
            "",
            command.help.strip(),
            "",
            "```",
            _usage(name, command),
        ]
        lines += ["```", ""]
        options = [one for one in command.params if one.param_type_name == "option"]
        shown = [one for one in options if not one.hidden and one.name != "help"]
        if shown:
            lines += ["| option | default | |", "|---|---|---|"]
            lines += [_row(one) for one in shown]
            lines += [""]
    return "\n".join(lines)


def _usage(name: str, command: Any) -> str:
    arguments = [_argument(one) for one in command.params if one.param_type_name == "argument"]
    return " ".join(["merge-cli", name, *arguments, "[OPTIONS]"])


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()) + "..." * (argument.nargs != 1)
    return name if argument.required else f"[{name}]"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    default = option.default
    empty = default is None or default is False or default in ((), [], "")
    shown = "" if empty else f"`{str(default).lower() if default is True else default}`"
    text = (option.help or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| {names} | {shown} | {text} |"
