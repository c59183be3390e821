"""Folders beside OUT in which learning and searching keep their unfinished work.

One process at a time; files are replaced whole, and are on the disk before the next step counts.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from merge_cli.checkpoint.raw import write_error
from merge_cli.errors import ResourceError, UsageError

_LOCK = "lock"


def folder_beside(target: Path, suffix: str) -> Path:
    """OUT and a suffix, beside the place that OUT really is."""
    real = Path(os.path.realpath(target))
    return real.with_name(real.name + suffix)


def lock_folder(path: Path, work: str) -> int:
    """Make the folder and take its lock.

    Args:
        work: what is done in it, for the message.

    Returns:
        a file descriptor: closing it lets the lock go.

    Raises:
        ResourceError: another process has it, or the place cannot be written.
    """
    lock = -1
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        hint = "Wait for it, or choose another OUT."
        raise ResourceError(f"another {work} writes here", where=str(path), hint=hint) from None
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        raise write_error(error, path) from error
    return lock


def other_work(work: str, path: Path) -> UsageError:
    """The error for unfinished work of something else."""
    what = f"{work} of another recipe, other inputs or another version is here"
    hint = "Finish it with its own command, or throw it away with --fresh."
    return UsageError(what, where=str(path), hint=hint)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and wait for the disk.

    Raises:
        ResourceError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise write_error(error, path) from error
