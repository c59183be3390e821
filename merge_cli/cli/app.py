"""The entry point of the command line: what all commands share, errors and exit codes.

Each command (see verbs.py) parses, calls the library, and prints; there is no logic here, and
nothing heavy to import. Exit codes: 0 done; 1 unexpected; 2 recipe or usage; 3 an input model or
data file; 4 resources; 5 a quality gate; 130 interrupted (the same command resumes). Results go to
stdout, everything else to stderr.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from typing import Annotated, Any

import typer

from merge_cli.cli.streams import (
    DEBUG,
    ReaderGone,
    as_merge_cli_error,
    debugging,
    drop_output,
    guard_streams,
    show_trace,
)
from merge_cli.cli.verbs import VerbGroup
from merge_cli.errors import ResourceError
from merge_cli.system.garbage import keep_to_the_end
from merge_cli.system.machine import library_threads, settle_home
from merge_cli.system.notices import send_notices

_INTERRUPTED = 130

app = typer.Typer(
    cls=VerbGroup,
    help="Merge language-model checkpoints: one recipe, one command, the same bytes every time.",
    epilog="Start with `merge-cli demo`. `merge-cli COMMAND --help` explains a command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"  # also for child processes
    if show_version:
        from importlib.metadata import version  # a twentieth of a second

        typer.echo(f"merge-cli {version('merge-cli')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every failure is one message and its exit code."""
    guard_streams()
    code = _run()
    try:
        sys.stdout.flush()
    except ReaderGone:
        drop_output()
        code = code or 1
    except ResourceError as error:
        drop_output()
        if not code:
            code = _report_error(error)
    if code == _INTERRUPTED:
        _leave(code)
    keep_to_the_end()
    sys.exit(code)


def _run() -> int:
    """Run the command; returns its exit code."""
    try:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        sys.unraisablehook = _unraisable
        send_notices(None)  # until there is a screen
        settle_home()
        _limit_libraries()
        # Commands return nothing; typer turns a KeyboardInterrupt into the code 130.
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        return int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted.", file=sys.stderr)
        return _INTERRUPTED
    except ReaderGone:
        return 1
    except Exception as error:
        # Usage errors of click, which some versions of typer vendor.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            return _usage(error)
        return _report_error(error)


def _report_error(error: Exception) -> int:
    """Print an error; returns its exit code."""
    ours = as_merge_cli_error(error)
    if debugging():
        show_trace(error)
    from merge_cli import console

    console.show_error(ours)
    return ours.exit_code


def _leave(code: int) -> None:
    """Exit at once: Python would take seconds to unload torch, and the user waits."""
    atexit._run_exitfuncs()  # child processes end and temporary folders are removed
    sys.stderr.flush()
    os._exit(code)


def _usage(error: Any) -> int:
    """Print click's message, which may quote any input."""
    from merge_cli.console import plain

    text = io.StringIO()
    error.show(file=text)
    print(plain(text.getvalue()), end="", file=sys.stderr)
    return int(error.exit_code)


def _limit_libraries() -> None:
    """Limit threads of BLAS and of child processes to a CPU quota that they cannot see."""
    quota = library_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if quota is not None and quota < (usable or 1):
        os.environ["OMP_NUM_THREADS"] = str(quota)


def _interrupt(number: int, frame: object) -> None:
    """Stop once: a second Ctrl-C must not interrupt the closing of the journal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _unraisable(dropped: sys.UnraisableHookArgs) -> None:
    """Raise an interruption once more that fell into a finaliser, where Python drops exceptions.

    Else it would be lost, and every later one is ignored. A timer raises it, because an exception
    of this function would be dropped as well.
    """
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)
