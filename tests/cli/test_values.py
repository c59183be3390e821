"""Values that typer does not check come out as typer makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.core import TyperCommand

from merge_cli.cli.help import HelpCommand

Command = type[TyperCommand]


def parsed(kind: Command, arguments: list[str]) -> dict[str, Any] | str:
    """What a command's function is called with, or the message of what is wrong."""
    app = typer.Typer(add_completion=False)
    seen: dict[str, Any] = {}

    @app.command(cls=kind)
    def command(
        text: str,
        path: Annotated[Path | None, typer.Argument()] = None,
        size: str = "5GB",
        number: Annotated[int, typer.Option(min=1)] = 12,
        share: float | None = None,
        many: list[str] | None = None,
        files: list[Path] | None = None,
        flag: bool = False,
        maybe: Annotated[bool | None, typer.Option("--maybe/--no-maybe")] = None,
        count: Annotated[int, typer.Option("-v", count=True)] = 0,
    ) -> None:
        seen.update(locals())

    try:
        typer.main.get_command(app).main(arguments, standalone_mode=False)
    except Exception as error:
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    return {name: value for name, value in seen.items() if name != "seen"}


OPTIONS = ["--size", "--number", "--share", "--many", "--files"]
WORDS = st.sampled_from(["0", "1", "7", "-1", "x", "a/b", ".", "1.5", "1e3", "\0", "é"])
PAIRS = st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=4)
FLAGS = st.lists(st.sampled_from(["--flag", "--maybe", "--no-maybe", "-v", "-vv"]), max_size=3)


@settings(deadline=None, max_examples=60)  # typer makes two commands for each
@given(st.lists(WORDS, max_size=3), PAIRS, FLAGS)
def test_values_are_those_of_typer(
    words: list[str], pairs: list[tuple[str, str]], flags: list[str]
) -> None:
    arguments = [*flags, *(f"{name}={value}" for name, value in pairs), "--", *words]
    assert parsed(HelpCommand, arguments) == parsed(TyperCommand, arguments)


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], ["a", "--number", "0"]])
def test_what_is_wrong_is_said_as_before(arguments: list[str]) -> None:
    message = parsed(HelpCommand, arguments)
    assert isinstance(message, str)
    assert message == parsed(TyperCommand, arguments)
