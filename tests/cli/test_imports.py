"""What a plain merge imports.

Users wait for it: a package or a room that comes in is to be looked at, and either imported later
or added here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.tiny import Family

# Packages of others, beside those that `import numba` brings.
PACKAGES = {
    "_yaml",
    "annotated_doc",  # typer
    "jinja2",  # the report's page
    "markupsafe",
    "merge_cli",
    "rich",
    "shellingham",  # typer
    "typer",
    "typing_extensions",
    "yaml",
}
BY_TYPER = {"annotated_types", "pydantic", "pydantic_core", "typing_inspection"}  # if it can
BY_THE_FIRST_LOOP = {"_cffi_backend", "cffi", "pycparser", "scipy"}  # numba looks for them
# Rooms whose recipes are others, and what says so.
IDLE = ("auto", "calibration", "dam", "evolve")
SAYS_SO = {"checks", "defaults", "preparation"}
# Rooms that a merge does without.
ABSENT = {
    "adapters", "analysis", "averages", "chat", "cluster", "comparison", "conversion", "data",
    "demo", "drafting", "evaluation", "json_schema", "publishing",
}  # fmt: skip

LISTING = "import sys\ntry:\n    {}\nfinally:\n    print(*sys.modules, file=sys.stderr)"
RUN = "from merge_cli.__main__ import main; main()"


def imported(code: str, *arguments: object) -> set[str]:
    """The modules of a process that has run some code."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING.format(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_a_plain_merge_imports_what_is_listed(family: Family, tmp_path: Path) -> None:
    modules = imported(RUN, "run", family.recipe("ties"), tmp_path / "out")
    floor = imported("import numpy, numba")
    packages = {name.partition(".")[0] for name in modules - floor} - sys.stdlib_module_names
    assert packages - {name.partition(".")[0] for name in floor} <= (
        PACKAGES | BY_TYPER | BY_THE_FIRST_LOOP
    )

    inside = {tuple(name.split(".")[1:]) for name in modules if name.startswith("merge_cli.")}
    assert {path[0] for path in inside} & ABSENT == set()
    rooms = {path for path in inside if path[0] in IDLE and len(path) > 1}
    assert {path[1] for path in rooms} <= SAYS_SO, rooms
    # What few recipes need: other formats, adapters, other methods.
    assert {path[1] for path in inside if path[0] == "formats" and len(path) > 1} <= {
        "dcp", "detect", "encoding", "endings", "packed", "storage_format", "stored_matrix",
        "stored_parts",
    }  # fmt: skip
    assert {("lora", "application"), ("remote", "models")} & inside == set()
    assert {("methods", "slerp"), ("methods", "dam")} & inside == set()
