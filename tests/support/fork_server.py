"""A process that has imported what commands need, and forks itself for each of them.

    python -m tests.support.fork_server DESCRIPTOR

A fresh interpreter spends two to four seconds on importing torch, numba and transformers. A fork
has them, and is a process like any other: its arguments, environment, folder, standard streams,
signals and exit code are its own. `command.cli` is the client.

When it is ready it sends a line over the socket DESCRIPTOR. Then come requests, each a line of JSON
with the three standard streams beside it; back go two lines, the number of the process and its exit
code.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

import merge_cli
from merge_cli.kernels.compiled.kernel import available
from tests.support.compiled import kernels
from tests.support.paths import ROOT

# What commands import when they run, in one way or another, beside the whole package.
MODULES = (
    "jinja2", "numba", "rich.progress", "rich.table", "safetensors.torch", "torch",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
)  # fmt: skip
# One starts a command; the other needs Triton, which is not everywhere.
NOT_IMPORTED = ("merge_cli.__main__", "merge_cli.kernels.triton_kernels")


def prepare() -> None:
    """Import what commands import and load what numba has compiled: most of a small merge.

    Nothing is called that starts a thread, because none may run when this process forks.
    """
    for name in MODULES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(merge_cli.__path__, "merge_cli."):
        if module.name not in NOT_IMPORTED:
            importlib.import_module(module.name)
    if not available():
        for kernel in kernels():
            kernel.load()
    read_arguments()
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, everything that a fork shares with us


def read_arguments() -> None:
    """typer imports as much again when it reads the first option."""
    command = typer.Typer()
    command.command()(_nothing)
    command(["--number", "1"], standalone_mode=False)


def _nothing(number: int = 0) -> None:
    pass


def serve(connection: socket.socket) -> list[str] | None:
    """In this process: None, when nobody asks any more. In a fork: the command's arguments."""
    while True:
        message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return None
        process = os.fork()
        if process == 0:
            connection.close()
            return become(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{process}\n".encode())
        _, status = os.waitpid(process, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Take over what the request says of the command."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments: list[str] = request["arguments"]
    return arguments


def run(arguments: list[str]) -> int:
    """The command, as `python -m merge_cli` runs it; its exit code."""
    from merge_cli import __main__

    sys.argv = [str(Path(__main__.__file__)), *arguments]
    try:
        with measured():
            __main__.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def measured() -> Iterator[None]:
    """Which lines run, if whoever asks measures that: pytest-cov puts the numbers together."""
    if "MERGE_CLI_TEST_COVERAGE" not in os.environ:
        yield
        return
    from coverage import Coverage

    data, settings = str(ROOT / ".coverage"), str(ROOT / "pyproject.toml")
    coverage = Coverage(data_file=data, data_suffix=True, config_file=settings)
    coverage.start()
    try:
        yield
    finally:
        coverage.stop()
        coverage.save()


def leave(code: int) -> NoReturn:
    """End as an interpreter does, but for freeing what was imported: that takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]  # private: typeshed has it not
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    prepare()
    client = socket.socket(fileno=int(sys.argv[1]))
    client.sendall(b"ready\n")
    command = serve(client)
    leave(0 if command is None else run(command))
