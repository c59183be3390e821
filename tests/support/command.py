"""The command line in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

_TIMEOUT = 300
_READ_WHILE_RUNNING = ("MERGE_CLI_", "PYTEST_")  # the rest, libraries may read when imported


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own.

    Args:
        arguments: what follows `merge-cli`.
        options: of `subprocess.run`. With any but `cwd`, `input` and `stdin` it starts from
            nothing; else it is a fork of one that has imported torch already.
    """
    words = [str(argument) for argument in arguments]
    if options.keys() <= {"cwd", "input", "stdin"}:
        server = fork_server()
        if server.serves(os.environ):
            return server.run(words, **options)
    return fresh_cli(*words, **options)


def fresh_cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`cli`, in a process that starts from nothing."""
    return subprocess.run(
        [sys.executable, "-m", "merge_cli", *map(str, arguments)],
        capture_output=True, text=True, **{"timeout": _TIMEOUT, **options},
    )  # fmt: skip


def failed(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


class ForkServer:
    """The client's side of `fork_server`, which ends with this process."""

    def __init__(self) -> None:
        self._environment = _fixed(os.environ)
        self._socket, theirs = socket.socketpair()
        number = str(theirs.fileno())
        command = [sys.executable, "-m", "tests.support.fork_server", number]
        self._process = subprocess.Popen(
            command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._answers = self._socket.makefile("r")
        assert self._answers.readline() == "ready\n", "it has ended: its stderr says why"
        atexit.register(self._end)

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether what it has imported is what a process with this environment would import."""
        return _fixed(environment) == self._environment

    def run(
        self,
        arguments: list[str],
        cwd: str | Path | None = None,
        input: str = "",
        stdin: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        request = {"arguments": arguments, "folder": str(cwd or Path.cwd()),
                   "environment": dict(os.environ)}  # fmt: skip
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as given,
            tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as err,
        ):
            given.write(input)
            given.seek(0)
            streams = [given.fileno() if stdin is None else stdin, out.fileno(), err.fileno()]
            socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
            code = self._wait(arguments)
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())

    def _end(self) -> None:
        self._answers.close()
        self._socket.close()
        self._process.wait()

    def _wait(self, arguments: list[str]) -> int:
        self._socket.settimeout(_TIMEOUT)
        process = self._process.pid
        try:
            process = int(self._answers.readline())
            return int(self._answers.readline())
        except TimeoutError:
            # This one's answers are out of step, and nothing more is read from what has timed out:
            # the next command starts another one.
            os.kill(process, signal.SIGKILL)
            fork_server.cache_clear()
            raise subprocess.TimeoutExpired(arguments, _TIMEOUT) from None


def _fixed(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith(_READ_WHILE_RUNNING)}


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()
