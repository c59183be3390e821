"""The quickstart is run as it stands: its recipes are files, its commands work in their order."""

from __future__ import annotations

import re
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


def test_its_commands_work(tmp_path: Path) -> None:
    for path in EXAMPLES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    commands = commands_of(PAGE)
    verbs = [command.split()[1] for command in commands]
    assert verbs == [
        "demo", "chat", "analyze", "init", "plan", "run", "run", "compare", "evaluate", "run",
        "push",
    ]  # fmt: skip
    output = {}
    for command in commands:
        done = cli(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        output[command.split()[1]] = done.stdout
    assert (tmp_path / "out" / "searched" / "model.safetensors").exists()
    assert 'model_id = "your-name/changes"' in output["push"]


def test_the_demo_prints_what_the_page_shows(tmp_path: Path) -> None:
    """As the packaged weights are read by this processor: shares may differ by a point or two."""
    shown = next(block for block in blocks("text", PAGE) if block.startswith("model "))
    done = cli("demo", cwd=tmp_path)
    numbers = [[int(n) for n in re.findall(r"(\d+) %", text)] for text in (shown, done.stdout)]
    for line, (page, here) in enumerate(zip(*numbers, strict=True)):
        assert abs(page - here) <= (0 if line == 12 else 2), done.stdout
    assert [line.split()[0] for line in shown.splitlines()[:5]] == [
        line.split()[0] for line in done.stdout.splitlines()[1:6]
    ]
