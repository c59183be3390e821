"""The help of every command fits 80 columns, and showing it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from merge_cli.cli import app

GROUP: Any = typer.main.get_command(app)


@pytest.mark.parametrize("command", ["", *GROUP.commands])
def test_help_fits_80_columns(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.output  # no name is cut off
    assert "<bool>" not in done.output
    shown = GROUP.commands[command].params if command else GROUP.params
    for option in shown:
        if option.param_type_name == "option" and not option.hidden:
            assert option.help[0].isupper() or option.help.startswith("--"), option.name
            assert option.help.endswith("."), option.name


def test_showing_the_help_keeps_the_spellings() -> None:
    run = GROUP.commands["run"]
    before = [(param.opts, param.secondary_opts, param.metavar) for param in run.params]
    context = typer.Context(run, info_name="run")
    run.get_help(context)
    assert [(param.opts, param.secondary_opts, param.metavar) for param in run.params] == before
