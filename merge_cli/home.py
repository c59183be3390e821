"""The user's folder, where there may be none.

A container may run as a number that nobody has given a name, without HOME. Then caches go to a
folder of our own among temporary files; and where even that cannot be, there are no caches.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from merge_cli.notices import say_once

_NOWHERE = Path("/nonexistent")  # by convention: nothing can be written there
_MEMORY = Path("/dev/shm")


def home_folder() -> Path:
    """HOME, or what the system says, or what stands in for it; it may not be writable."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no such user
        return _stand_in()


def settle_home() -> None:
    """Name the stand-in to libraries that look for HOME: they would make a folder called `~`.

    And name a folder for temporary files to those that cannot even be imported without one, as
    torch: in a container that can be read alone, the one in memory.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = str(_MEMORY if os.access(_MEMORY, os.W_OK) else _NOWHERE)
        os.environ["TMPDIR"] = tempfile.tempdir
    try:
        Path.home()
    except RuntimeError:
        folder = _stand_in()
        os.environ["HOME"] = str(folder)
        kept = "caches are not kept" if folder == _NOWHERE else f"caches are kept in {folder}"
        say_once(f"there is no home folder: {kept}. Set HOME to choose one.")


def _stand_in() -> Path:
    try:
        folder = Path(tempfile.gettempdir()) / f"merge-cli-{os.getuid()}"
        if folder.parent == _MEMORY:  # caches would fill it
            return _NOWHERE
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError:  # nothing can be written
        return _NOWHERE
    # Somebody else may have made it before us, to be believed.
    private = stat.S_ISDIR(about.st_mode) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and about.st_uid == os.getuid() else _NOWHERE
