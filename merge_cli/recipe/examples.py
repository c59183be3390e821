"""The commented recipes that come with the package: one for each method, run by the tests."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
# In an installed package they lie inside of it, in a checkout beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def example_recipe(names: Collection[str]) -> tuple[str, str] | None:
    """The example of a method.

    Args:
        names: the method's name and its aliases.

    Returns:
        the file's name in `configs/` and its text; None for a method without an example.
    """
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        return None
    # The file that is called like the method comes first: there may be several with it.
    for path in sorted(folder.glob("*.yaml"), key=lambda path: (path.stem not in names, path.name)):
        text = path.read_text(encoding="utf-8")
        if any(
            line.startswith("merge_method:") and _word(line) in names for line in text.splitlines()
        ):
            return path.name, text
    return None


def _word(line: str) -> str:
    return line.partition(":")[2].partition("#")[0].strip()
