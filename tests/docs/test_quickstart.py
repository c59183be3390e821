"""The quickstart is run as it stands: its recipes are files, its commands work in their order."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.support.command import cli
from tests.support.documents import blocks, commands_of
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "docs" / "examples"


def test_the_recipes_shown_are_files() -> None:
    shown = {}
    for block in blocks("yaml", PAGE):
        name, _, body = block.partition("\n")
        shown[name.removeprefix("# docs/examples/")] = body
    assert shown == {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.iterdir()}


def test_its_commands_work(tmp_path: Path, zoo: Path) -> None:
    (tmp_path / "zoo").symlink_to(zoo)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    commands = commands_of(PAGE)
    verbs = [command.split()[1] for command in commands]
    assert verbs == [
        "analyze", "init", "plan", "run", "run", "compare", "evaluate", "run", "push",
    ]  # fmt: skip
    for command in commands:
        done = cli(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "out" / "searched" / "model.safetensors").exists()
    assert 'model_id = "your-name/changes"' in done.stdout
