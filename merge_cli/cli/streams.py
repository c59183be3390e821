"""stdin, stdout and stderr as we are given them: closed, full, or in another encoding than UTF-8.

A result that cannot be written to stdout is an error. A character that a terminal cannot show is
none, and neither is a note for a stderr that cannot be written.

What nobody has foreseen, as one sentence; its traceback goes to a file.
"""

from __future__ import annotations

import errno
import io
import os
import platform
import re
import select
import sys
import tempfile
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from merge_cli.errors import MergeCliError, ResourceError, SourceError, UnexpectedError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_HINT = "What the command has written to files is complete."


class ReaderGone(Exception):
    """Whoever read our output has gone (`| head`): nothing is wrong, nobody is listening."""


class _Results(io.FileIO):
    """stdout. No OSError: those of files must not be taken for its own."""

    def write(self, data: ReadableBuffer, /) -> int:
        while True:
            try:
                written = super().write(data)
            except BrokenPipeError:
                raise ReaderGone from None
            except OSError as error:
                message = f"the result cannot be written to stdout: {error.strerror}"
                raise ResourceError(message, hint=_HINT) from error
            if written is not None:
                return written
            select.select([], [self], [])  # whoever started us made the pipe non-blocking


class _Remarks(io.FileIO):
    """stderr. There is nobody left to tell that it cannot be written."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def guard_streams() -> None:
    """Make the standard streams what this module promises.

    A number that is closed is taken first: the next file would get it, and a library that prints
    would print into a model.
    """
    _take(0, os.O_RDONLY)
    _take(1, os.O_RDONLY)  # so that writing to it fails, as its owner wanted
    _take(2, os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Results(1, "wb", closefd=False), sys.stdout, "replace")
    sys.stderr = _text(_Remarks(2, "wb", closefd=False), sys.stderr, "backslashreplace")


def drop_output() -> None:
    """Forget what could not be written, or the interpreter would try again while it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _take(number: int, flags: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, flags)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)


def _text(raw: io.FileIO, before: TextIO | None, errors: str) -> TextIO:
    encoding = before.encoding if before is not None else "utf-8"
    if before is not None:
        before.flush()
    lines = raw.isatty() or errors == "backslashreplace"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=lines)


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
        message, hint = _REFUSED[error.errno]
        return ResourceError(message, where=str(error.filename or ""), hint=hint)
    return None


def _unexpected(error: Exception) -> UnexpectedError:
    said = _TOKEN.sub("hf_...", str(error).strip().partition("\n")[0])
    message = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = _write(_report(error))
    if place is None:
        trace = "".join(traceback.format_exception(error))
        return UnexpectedError(message, hint=f"Please report it with what follows.\n{trace}")
    return UnexpectedError(message, where=str(place), hint="Please report it with this file.")


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
