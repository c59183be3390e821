"""Paths that can be written down, and a working directory that is there.

To the system a path is bytes. Recipes, reports, cards and the libraries that load models take it as
text. So one rule holds everywhere: a path that is not UTF-8 is refused before any work, as it is
given and where links lead. In a locale without UTF-8 that is any path beyond ASCII.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_cli.errors import SourceError, UsageError


def require_text(path: Path | str) -> None:
    """Refuse a path that is not text, or leads to one that is not.

    Raises:
        UsageError: names it.
    """
    _refuse("the path", os.fspath(path))
    with suppress(ValueError):  # a NUL in it: whoever opens it says so
        _refuse("the path", os.path.realpath(path))


def require_arguments(values: Iterable[Any]) -> None:
    """Refuse arguments and options of a command that are not text.

    Args:
        values: as they were parsed: texts, paths, lists of these, and others.

    Raises:
        UsageError: names the first.
    """
    for value in values:
        if isinstance(value, list | tuple):
            require_arguments(value)
        elif isinstance(value, str | Path):
            _refuse("the argument", os.fspath(value), "Write it in UTF-8; rename what it names.")


def require_working_folder() -> None:
    """Refuse to work where relative paths lead nowhere, or to what is not text.

    Raises:
        UsageError: the working directory was removed, or its path is not text.
    """
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        hint = "Change to another folder: cd."
        raise UsageError("the working directory is gone", hint=hint) from None
    except OSError as error:
        raise UsageError(f"the working directory cannot be found: {error.strerror}") from None
    _refuse("the path of the working directory", folder)


def require_names(names: Iterable[str], folder: str) -> None:
    """Refuse files in a model's folder whose names are not text.

    Args:
        folder: the model, for the message.

    Raises:
        SourceError: names the first.
    """
    for name in names:
        if not _is_text(name):
            message = "the name of a file in it is not UTF-8 text"
            raise SourceError(message, model=folder, file=shown(name), hint="Rename it.")


def shown(name: str) -> str:
    """A name of the file system as text, with its other bytes as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(kind: str, text: str, advice: str = "Rename it.") -> None:
    if _is_text(text):
        return
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") == "utf8":
        message, hint = f"{kind} is not UTF-8 text", advice
    else:
        message = f"{kind} is not text in this locale ({encoding})"
        hint = "Set PYTHONUTF8=1, or choose a locale with UTF-8."
    raise UsageError(message, where=shown(text), hint=hint)
