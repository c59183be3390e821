"""What nobody has foreseen, as one sentence; its traceback goes to a file."""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import tempfile
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from merge_cli.errors import MergeCliError, ResourceError, SourceError, UnexpectedError

DEBUG = "MERGE_CLI_DEBUG"
_MEMORY = "Give it less: a lower --max-memory, fewer --threads, smaller batches."
_LIBRARIES = ("numpy", "numba", "torch", "transformers", "huggingface_hub", "safetensors")
_TOKEN = re.compile(r"\bhf_\w{4,}")
# What the system refuses whatever a program does: (what, what to do).
_REFUSED = {
    errno.ENOSPC: ("the disk is full", "Free some space."),
    errno.EDQUOT: ("the quota of the disk is used up", "Free some space."),
    errno.EFBIG: ("a file would be larger than the system allows", "See: ulimit -f."),
    errno.EROFS: ("the file system can only be read", "Choose another folder."),
    errno.EACCES: ("permission denied", "Check who may read and write it."),
    errno.EPERM: ("not permitted", "Check who may read and write it."),
    errno.EIO: ("the disk cannot be read or written", "Check the disk, and the system's log."),
    errno.ESTALE: ("the file has gone from its server", "Try again."),
    errno.ENOMEM: ("memory ran out", _MEMORY),
    errno.EMFILE: ("too many files are open", "Raise the limit: ulimit -n."),
    errno.ENFILE: ("too many files are open on this machine", "Try again later."),
    errno.EAGAIN: ("no more processes can be started", "Raise the limit: ulimit -u."),
}


def debugging() -> bool:
    """Whether tracebacks are wanted: `--debug`, or the environment."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def show_trace(error: Exception) -> None:
    """The traceback on stderr. It quotes what was read, too."""
    from merge_cli.console import plain

    print(plain("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def as_ours(error: Exception) -> MergeCliError:
    """Any exception as one of ours: what the machine refuses, or an UnexpectedError.

    The traceback of the latter is written to a file that it names.
    """
    if isinstance(error, MergeCliError):
        return error
    return _machine(error) or _unexpected(error)


def _machine(error: Exception) -> MergeCliError | None:
    """What the machine, or an input, makes impossible anywhere; None for everything else."""
    text = str(error)
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return ResourceError("memory ran out", hint=_MEMORY)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        hint = "Use fewer --threads, or raise the limit: ulimit -u."
        return ResourceError("no more threads can be started", hint=hint)
    if isinstance(error, RecursionError):
        hint = "Repeat it with `merge-cli --debug` to see which."
        return SourceError("an input nests too deeply", hint=hint)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        what, hint = _REFUSED[error.errno]
        return ResourceError(what, where=str(error.filename or ""), hint=hint)
    return None


def _unexpected(error: Exception) -> UnexpectedError:
    said = _TOKEN.sub("hf_...", str(error).strip().partition("\n")[0])
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = _write(_report(error))
    if place is None:
        trace = "".join(traceback.format_exception(error))
        return UnexpectedError(what, hint=f"Please report it with what follows.\n{trace}")
    return UnexpectedError(what, where=str(place), hint="Please report it with this file.")


def _report(error: Exception) -> str:
    """What helps to find the fault, and nothing that is secret."""
    versions = {"merge-cli": version("merge-cli"), "python": platform.python_version()}
    versions |= {name: version(name) for name in _LIBRARIES if name in sys.modules}
    lines = [
        " ".join(sys.argv),
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        platform.platform(),
        "",
        *traceback.format_exception(error),
    ]
    return _TOKEN.sub("hf_...", "\n".join(lines))


def _write(text: str) -> Path | None:
    """Into a new file among temporary ones, or here; None where nothing can be written."""
    folders = []
    with suppress(OSError):  # none of the usual ones
        folders.append(tempfile.gettempdir())
    for folder in [*folders, os.curdir]:
        try:
            number, name = tempfile.mkstemp(".txt", "merge-cli-error-", folder)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return Path(name)
    return None
