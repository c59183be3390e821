"""The help of every command fits 80 columns, and showing it changes nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from merge_cli.cli import app
from merge_cli.cli.verbs import VERBS

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


@pytest.mark.parametrize("name", VERBS)
def test_the_list_says_what_the_command_says(name: str) -> None:
    command = GROUP.commands[name]
    assert " ".join(command.help.partition("\n\n")[0].split()) == VERBS[name].summary
    assert command.rich_help_panel == VERBS[name].panel


def test_the_list_imports_no_command() -> None:
    code = (
        "import sys, typer\nfrom merge_cli.cli import app\n"
        "from typer.testing import CliRunner\n"
        "assert 'extract-lora' in CliRunner().invoke(app, ['--help']).output\n"
        "assert not {f'merge_cli.cli.{name}' for name in sys.argv[1:]} & set(sys.modules)\n"
    )
    modules = {verb.module for verb in VERBS.values()}
    subprocess.run([sys.executable, "-c", code, *modules], check=True, timeout=60)
