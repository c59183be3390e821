"""Where this tool keeps what can be computed again, and how it is written there.

    $MERGE_CLI_CACHE, or merge-cli in $XDG_CACHE_HOME or ~/.cache

The folder may be deleted at any time. Several processes may write one file of it at once: each
writes a file of its own, and the last one stays.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge_cli.system.machine import home_folder
from merge_cli.system.raw_io import unfinished_file


def cache_folder() -> Path:
    """The folder of caches; it may not be there, or not be writable."""
    chosen = os.environ.get("MERGE_CLI_CACHE")
    if chosen:
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else home_folder() / ".cache") / "merge-cli"


def write_cached(path: Path, content: bytes) -> bool:
    """Write a cache file, whole or not at all; False where the folder cannot be written."""
    try:
        with unfinished_file(path) as file:
            file.write_bytes(content)
    except OSError:
        return False
    return True
