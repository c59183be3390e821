"""Commands in messages can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from merge_cli.system.shell import command


@pytest.mark.parametrize("path", ["plain/r.yaml", "my demo/my rec.yaml", "it's", "$HOME", "a;b"])
def test_a_command_is_read_back(path: str) -> None:
    assert shlex.split(command("plan", Path(path))) == ["merge-cli", "plan", path]
    assert command("plan", "plain/r.yaml") == "merge-cli plan plain/r.yaml"
