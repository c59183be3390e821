"""Child processes that end when their parent does, and import nothing from where it was started.

    merge_cli.system.processes FD MODULE ARGUMENTS...     (by `python_command`)

A process that is killed cannot tell its children. So the parent holds the writing end of a pipe of
which the child has the reading end, and the child watches it: when it closes, the parent is gone.
On Linux the kernel is asked for a signal, too, which also reaches a child that is stuck in a long
call.

`python -m` and `python -c` look for modules in the working directory first. That may be the folder
of a model, where a file called `torch.py` would be run. The child gets the parent's path instead.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_PR_SET_PDEATHSIG = 1
_SECONDS = 1.0  # between two looks at who the parent is, where the pipe tells nothing


@contextmanager
def child(
    module: str, arguments: Sequence[str], *, inherited: Sequence[int] = (), **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start `python -m MODULE ARGUMENTS` so that it does not outlive this process.

    Leaving with an exception kills it.

    Args:
        inherited: descriptors that the child keeps, such as that of a lock.
        options: of `subprocess.Popen`.
    """
    ours: tuple[int, int] = os.pipe()
    reading, writing = ours
    command = python_command("merge_cli.system.processes", str(reading), module, *arguments)
    try:
        process = subprocess.Popen(command, pass_fds=(reading, *inherited), **options)
        os.close(reading)
        reading = -1
        with process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise
    finally:
        for descriptor in (reading, writing):
            if descriptor >= 0:
                os.close(descriptor)


def end_with(parent: int, descriptor: int = -1) -> None:
    """From now on end this process when its parent has.

    Args:
        parent: its process id, as it was when this process began.
        descriptor: of a pipe whose other end the parent holds, or anything that can be read when
            the parent has gone.
    """
    _ask_the_kernel()
    if os.getppid() != parent:
        os._exit(1)
    watch = threading.Thread(target=_watch, args=(parent, descriptor), daemon=True)
    watch.start()


def _watch(parent: int, descriptor: int) -> None:
    watched = [descriptor] if descriptor >= 0 else []
    while True:
        ready, _, _ = select.select(watched, [], [], _SECONDS)
        if ready or os.getppid() != parent:
            os._exit(1)  # at once: what is half done is continued from its journal


def _ask_the_kernel() -> None:
    """Linux sends a signal when the parent dies; elsewhere the watch alone must do."""
    if sys.platform != "linux":
        return
    import ctypes

    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):  # a C library without it
        return
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _main() -> None:
    import runpy

    descriptor, module = int(sys.argv[1]), sys.argv[2]
    end_with(os.getppid(), descriptor)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `__main__`, with this process's `sys.path`."""
    path = [entry for entry in sys.path if entry]  # "" is the working directory
    code = f"import sys; sys.path[:] = {path!r}; import runpy; "
    code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, *arguments]
