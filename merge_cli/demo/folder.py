"""The demo's models, data and recipe: package data, copied to where the user can look at them.

Beside this file lies the folder `family`, and a copy of it is the folder that a user gets:

    base, german, french    models of 0.17 million parameters that read numbers in words;
                            scripts/demo_family of the repository trains them
    data/*.jsonl            rows to train, to choose (val) and to report on (test)
    recipe.yaml             the merge; its lambda was chosen on the val rows
    eval.yaml               right answers to the test rows
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from merge_cli.errors import UsageError
from merge_cli.system.raw_io import write_error

BASE = "base"
EXPERTS = ("german", "french")
RECIPE = "recipe.yaml"
TASKS = "eval.yaml"
DATA = "data"


def write_family(out: Path, *, overwrite: bool = False) -> None:
    """Copy the family into the folder `out`.

    Args:
        overwrite: replace the family in a folder that an earlier demo has made.

    Raises:
        UsageError: as `check_folder` does.
        ResourceError: it cannot be written.
    """
    check_folder(out, overwrite=overwrite)
    try:
        with as_file(files("merge_cli.demo") / "family") as family:
            for path in sorted(family.rglob("*")):
                target = out / path.relative_to(family)
                if path.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
    except OSError as error:
        raise write_error(error, out) from error


def check_folder(out: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that the demo would not write.

    Raises:
        UsageError: `out` exists, and is not to be overwritten, or is not the demo's.
    """
    if out.is_symlink() or out.exists():
        if not overwrite:
            hint = "Give --overwrite, or name another folder."
            raise UsageError("already exists", where=str(out), hint=hint)
        if not _is_demo(out):
            hint = "Name another folder."
            raise UsageError("is not a folder that the demo has made", where=str(out), hint=hint)


def _is_demo(out: Path) -> bool:
    """Whether a folder holds the demo's parts."""
    return all((out / name).exists() for name in (BASE, *EXPERTS, DATA, RECIPE, TASKS))
