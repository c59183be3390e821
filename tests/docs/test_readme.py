"""What the README shows is what is there: recipes, commands and code are run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import cli
from tests.support.documents import README, blocks, commands_of
from tests.support.paths import ROOT


@pytest.fixture
def checkout(tmp_path: Path, zoo: Path) -> Path:
    """A folder that looks like a fresh clone, to write in."""
    for name in ("configs", "zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_recipe_shown_is_the_one_in_configs() -> None:
    (shown,) = blocks("yaml")
    name, _, body = shown.partition("\n")
    file = (ROOT / name.removeprefix("# ")).read_text(encoding="utf-8")
    lines = [line for line in file.splitlines() if not line.startswith("#")]
    assert body.splitlines() == lines


def test_commands_and_code(checkout: Path) -> None:
    commands = commands_of(README)
    assert len(commands) >= 2
    for command in commands:
        arguments = shlex.split(command)[1:]
        done = cli(*arguments, cwd=checkout)
        assert done.returncode == 0, done.stderr
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.splitlines()[-1]) < 2


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_method_has_a_row_and_a_recipe() -> None:
    from merge_cli.methods.registry import all_methods, method_names

    recipes = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "configs").glob("*.yaml"))
    for name in method_names():
        assert f"`{name}`" in README
        assert f"`{name}`" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in (method.name for method in all_methods()):
        assert f"merge_method: {name}\n" in recipes
