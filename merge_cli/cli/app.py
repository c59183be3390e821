"""The command line: each verb parses, calls the library, shows. No logic, nothing heavy to import.

Exit codes: 0 done; 1 unexpected; 2 recipe or usage; 3 an input model or data file; 4 resources;
5 a quality gate; 130 interrupted (the same command resumes). Results go to stdout, the rest to
stderr.

`merge-cli methods`.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from merge_cli.cli.analyze import analyze
from merge_cli.cli.compare import compare
from merge_cli.cli.convert import convert
from merge_cli.cli.evaluate import evaluate
from merge_cli.cli.extract_lora import extract_lora
from merge_cli.cli.init import init
from merge_cli.cli.options import JsonOption, complete_method
from merge_cli.cli.push import push
from merge_cli.cli.run import plan, run
from merge_cli.cli.schema import schema
from merge_cli.cli.streams import (
    DEBUG,
    ReaderGone,
    as_ours,
    debugging,
    drop_output,
    guard_streams,
    show_trace,
)
from merge_cli.errors import ResourceError
from merge_cli.system.machine import library_threads, settle_home
from merge_cli.system.notices import send_notices


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One method, with its parameters and an example.", autocompletion=complete_method
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or explain one."""
    from merge_cli import console
    from merge_cli.methods.registry import all_methods, get_method

    screen = console.Screen()
    if name is None:
        screen.methods(all_methods(), as_json=as_json)
    else:
        screen.method(get_method(name), as_json=as_json)


_INTERRUPTED = 130

app = typer.Typer(
    help="Merge language-model checkpoints: one recipe, one command, the same bytes every time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error, too.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"  # for the processes that we start, too
    if show_version:
        typer.echo(f"merge-cli {version('merge-cli')}")
        raise typer.Exit


_VERBS = (
    init,
    run,
    plan,
    methods,
    analyze,
    evaluate,
    compare,
    push,
    convert,
    extract_lora,
    schema,
)
for verb in _VERBS:
    app.command()(verb)


def main() -> None:
    """Run the command line; every failure is one message and the exit code of its kind."""
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
            code = _told(error)
    if code == _INTERRUPTED:
        _leave(code)
    sys.exit(code)


def _run() -> int:
    """The command, and its exit code."""
    try:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        send_notices(None)  # until there is a screen
        settle_home()
        _limit_libraries()
        # Verbs return nothing; typer answers a KeyboardInterrupt with the code 130.
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
        # Usage errors of click, of which typer has its own copy or not, depending on its version.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            return _usage(error)
        return _told(error)


def _told(error: Exception) -> int:
    """Say what went wrong; the exit code of its kind."""
    known = as_ours(error)
    if debugging():
        show_trace(error)
    from merge_cli import console

    console.show_error(known)
    return known.exit_code


def _leave(code: int) -> None:
    """End now: taking torch down, piece by piece, takes seconds, and somebody waits."""
    atexit._run_exitfuncs()  # other processes and temporary folders are cleared away all the same
    sys.stderr.flush()
    os._exit(code)


def _usage(error: Any) -> int:
    """What click says, which quotes what was typed."""
    from merge_cli.console import plain

    text = io.StringIO()
    error.show(file=text)
    print(plain(text.getvalue()), end="", file=sys.stderr)
    return int(error.exit_code)


def _limit_libraries() -> None:
    """Tell BLAS, and the processes that we start, of a quota that they cannot see."""
    most = library_threads()
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if most is not None and most < (affine or 1):
        os.environ["OMP_NUM_THREADS"] = str(most)


def _interrupt(number: int, frame: object) -> None:
    """Stop once: pressing Ctrl-C again must not break the closing of the journal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
