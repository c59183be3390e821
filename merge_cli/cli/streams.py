"""Standard streams that may be closed, full, or not UTF-8; and unexpected errors as messages.

A result that cannot be written to stdout is an error. A character that a terminal cannot show is no
error, nor is a stderr that cannot be written. Of an unexpected error the message is one sentence;
its traceback goes to a file.
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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from merge_cli.errors import MergeCliError, ResourceError, SourceError, UnexpectedError
from merge_cli.system.libraries import library_version, missing

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_HINT = "What the command has written to files is complete."
DEBUG = "MERGE_CLI_DEBUG"
_MEMORY = "Use less memory: a lower --max-memory, fewer --threads, smaller batches."
_LIBRARIES = ("numpy", "numba", "torch", "transformers", "huggingface_hub", "safetensors")
_TOKEN = re.compile(r"\bhf_\w{4,}")
# Errors of the system: (message, hint).
_SYSTEM_ERRORS = {
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


class ReaderGone(Exception):
    """The reader of our output has ended (`| head`): nothing is wrong."""


class _Stdout(io.FileIO):
    """stdout. Its errors are no OSErrors, so that they differ from those of files."""

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
            select.select([], [self], [])  # the pipe is non-blocking


class _Stderr(io.FileIO):
    """stderr. Its errors are ignored: there is no other stream to report them to."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def guard_streams() -> None:
    """Replace the standard streams by those of this module.

    Closed descriptors are opened first: otherwise the next file would get their number, and a
    library that prints would print into a model.
    """
    _take(0, os.O_RDONLY)
    _take(1, os.O_RDONLY)  # so that writing to a closed stdout still fails
    _take(2, os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Stdout(1, "wb", closefd=False), sys.stdout, "replace")
    sys.stderr = _text(_Stderr(2, "wb", closefd=False), sys.stderr, "backslashreplace")


def drop_output() -> None:
    """Discard unwritten output, which the interpreter would try to write again at its end."""
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


def debugging() -> bool:
    """Whether to print tracebacks: `--debug`, or the environment."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def show_trace(error: Exception) -> None:
    """Print the traceback to stderr, without control characters of untrusted text."""
    from merge_cli.console import plain

    print(plain("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def as_merge_cli_error(error: Exception) -> MergeCliError:
    """Any exception as a MergeCliError: an error of the system, or an UnexpectedError.

    The latter names a file with its traceback.
    """
    if isinstance(error, MergeCliError):
        return error
    return _library_error(error) or _system_error(error) or _unexpected(error)


def _library_error(error: Exception) -> MergeCliError | None:
    """A library that cannot be imported: missing, or a build for another machine.

    An OSError is one only where the import system raised it.
    """
    if isinstance(error, OSError):
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.startswith("<frozen importlib") for frame in frames):
            return None
    elif not isinstance(error, ImportError):
        return None
    for name in ("torch", "transformers"):
        try:
            import_module(name)
        except (ImportError, OSError) as cause:
            return missing(name, "this command", cause)
    return None


def _system_error(error: Exception) -> MergeCliError | None:
    """Errors of the system that can occur anywhere; None for everything else."""
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
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        message, hint = _SYSTEM_ERRORS[error.errno]
        return ResourceError(message, where=str(error.filename or ""), hint=hint)
    return None


def _unexpected(error: Exception) -> UnexpectedError:
    text = _TOKEN.sub("hf_...", str(error).strip().partition("\n")[0])
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    path = _write(_report(error))
    if path is None:
        trace = "".join(traceback.format_exception(error))
        return UnexpectedError(message, hint=f"Please report it with what follows.\n{trace}")
    return UnexpectedError(message, where=str(path), hint="Please report it with this file.")


def _report(error: Exception) -> str:
    """What helps to find the fault, without tokens."""
    from importlib.metadata import version

    versions = {"merge-cli": version("merge-cli"), "python": platform.python_version()}
    loaded = [name for name in _LIBRARIES if name in sys.modules]
    versions |= {name: library_version(name) or "unknown" for name in loaded}
    lines = [
        " ".join(sys.argv),
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        platform.platform(),
        "",
        *traceback.format_exception(error),
    ]
    return _TOKEN.sub("hf_...", "\n".join(lines))


def _write(text: str) -> Path | None:
    """Write a new temporary file, or one in the current folder; None where neither is possible."""
    folders = []
    with suppress(OSError):  # no temporary folder
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
