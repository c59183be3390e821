"""Without torch and transformers: an averaging user's commands work, and give the same bytes.

Two cases: a container that has never installed them, and a CUDA build that cannot be loaded on this
machine, which fails with an OSError.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import merge_cli.demo
from tests.support.command import cli
from tests.support.tiny import Family

CASES = ("absent", "broken")
# Both libraries fail as they do on such machines; then the commands run one after the other.
DRIVER = """
import importlib.metadata, json, sys
case, commands = sys.argv[1], json.loads(sys.argv[2])
HIDDEN = ("torch", "transformers")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            if case == "absent":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            raise OSError("libcudart.so.12: cannot open shared object file")

sys.meta_path.insert(0, Blocked())
if case == "absent":
    find = importlib.metadata.Distribution.from_name.__func__

    def from_name(cls, name):
        if name in HIDDEN:
            raise importlib.metadata.PackageNotFoundError(name)
        return find(cls, name)

    importlib.metadata.Distribution.from_name = classmethod(from_name)

from merge_cli.cli.app import main

for command in commands:
    sys.argv = ["merge-cli", *command]
    try:
        main()
    except SystemExit as end:
        print(f"exit {end.code or 0}", file=sys.stderr, flush=True)
assert not set(HIDDEN) & set(sys.modules)
"""


def without_torch(case: str, *commands: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, case, json.dumps(commands)],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def recipe(family: Family) -> Path:
    return family.recipe("ties", parameters={"density": 0.5}, dtype="bfloat16")


@pytest.mark.parametrize("case", CASES)
def test_merging_needs_neither(case: str, recipe: Path, family: Family) -> None:
    folder = recipe.parent
    models = ["--base", "base", "--model", "a"]
    done = without_torch(
        case,
        ["plan", str(recipe)],
        ["run", str(recipe), "without"],
        ["analyze", "--base", "base", "a", "b"],
        ["init", *models, "--output", "new.yaml", "--yes"],
        ["methods"],
        ["methods", "wudi"],
        ["schema"],
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exit 0") == 7, done.stderr
    report = json.loads((folder / "without" / "merge_report.json").read_text(encoding="utf-8"))
    assert (report["versions"]["torch"] is None) == (case == "absent")
    assert cli("run", recipe, "with", cwd=folder).returncode == 0
    assert digest(folder / "with") == digest(folder / "without")


@pytest.mark.parametrize("case", CASES)
def test_what_needs_them_says_what_to_install(case: str, recipe: Path, family: Family) -> None:
    folder = recipe.parent
    model = Path(merge_cli.demo.__file__).parent / "family" / "base"
    (folder / "text.txt").write_text("three hundred", encoding="utf-8")
    wudi = folder / "wudi.yaml"
    wudi.write_text("merge_method: wudi\nbase_model: base\nmodels: [a, b]\n", encoding="utf-8")
    stacked = folder / "stacked.yaml"
    stacked.write_text(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 4]}]\n"
        "  - sources: [{model: b, layer_range: [2, 4]}]\n",
        encoding="utf-8",
    )
    commands = [
        ["evaluate", str(model), "--data", "text.txt", "--no-cache"],
        ["chat", str(model)],
        ["run", str(wudi), "out"],
        ["run", str(recipe), "out", "--device", "cuda"],
        ["run", str(recipe), "out", "--data", "text.txt"],
        ["plan", str(stacked)],
        ["demo", "demo"],
    ]
    done = without_torch(case, *commands, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("Resources error")]
    assert len(messages) == len(commands), done.stderr
    assert done.stderr.count("exit 4") == len(commands), done.stderr
    reason = "is not installed" if case == "absent" else "cannot be imported here (libcudart.so.12"
    for message in messages:
        assert reason in message
        assert "pip install t" in message
    assert not (folder / "out").exists()
    assert not (folder / "demo").exists()
