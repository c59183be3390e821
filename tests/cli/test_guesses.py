"""Guesses at names of commands and options are understood, or answered with the nearest one."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from merge_cli.cli import app, guesses
from tests.support.command import cli, failed
from tests.support.tiny import Family

GROUP: Any = typer.main.get_command(app)


def options_of(command: str) -> set[str]:
    return {name for param in GROUP.commands[command].params for name in param.opts}


def test_merge_is_run(family: Family) -> None:
    recipe = family.recipe("soup")
    done = cli("merge", recipe, "out", cwd=family.folder)
    assert done.returncode == 0, done.stderr
    assert (family.folder / "out" / "model.safetensors").is_file()
    assert "run" in cli("merge", "--help").stdout.splitlines()[1]


def test_every_guess_is_a_command_or_option_that_exists() -> None:
    assert set(guesses.ALIASES.values()) <= set(GROUP.commands)
    commands = {name for name in guesses.COMMANDS.values() if not name.startswith("--")}
    assert commands <= set(GROUP.commands)
    assert not {*guesses.ALIASES, *guesses.COMMANDS} & set(GROUP.commands)
    options = {name for command in GROUP.commands for name in options_of(command)}
    assert set(guesses.OPTIONS.values()) <= options | {"OUT"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("merg", "run"),
        ("evalute", "evaluate"),
        ("eval", "evaluate"),
        ("Plan", "plan"),
        ("talk", "chat"),
        ("uploda", "push"),
        ("extract-lroa", "extract-lora"),
        ("help", "--help"),
        ("qwertz", ""),
    ],
)
def test_the_nearest_command(typed: str, meant: str) -> None:
    assert guesses.command_meant(typed, GROUP.commands) == meant


@pytest.mark.parametrize(
    ("command", "typed", "message"),
    [
        ("run", "--theads", "No such option: --theads. Did you mean '--threads'?"),
        ("run", "--force", "No such option: --force. Did you mean '--overwrite'?"),
        ("run", "-o", "No such option: -o. Write OUT without a flag."),
        ("plan", "--devcie", "No such option: --devcie. Did you mean '--device'?"),
        ("chat", "--temp", "No such option: --temp. Did you mean '--temperature'?"),
        ("evaluate", "--base", "No such option: --base. Did you mean '--against'?"),
        ("schema", "--qwertz", "No such option: --qwertz.\n"),
    ],
)
def test_a_mistyped_option_names_the_nearest(command: str, typed: str, message: str) -> None:
    failed(cli(command, typed, "x"), 2, message)


def test_a_mistyped_command_names_the_nearest() -> None:
    failed(cli("merg", "x"), 2, "No such command 'merg'. Did you mean 'run'?")
    failed(cli("qwertz"), 2, "No such command 'qwertz'.\n")
