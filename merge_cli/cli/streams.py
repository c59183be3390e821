"""stdin, stdout and stderr as we are given them: closed, full, or in another encoding than UTF-8.

A result that cannot be written to stdout is an error. A character that a terminal cannot show is
none, and neither is a note for a stderr that cannot be written.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from merge_cli.errors import ResourceError

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
                what = f"the result cannot be written to stdout: {error.strerror}"
                raise ResourceError(what, hint=_HINT) from error
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
