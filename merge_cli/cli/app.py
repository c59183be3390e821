"""The command line: each verb parses, calls the library, shows. No logic, nothing heavy to import.

Exit codes: 0 done; 1 unexpected; 2 recipe or usage; 3 an input model or data file; 4 resources;
5 a quality gate; 130 interrupted (the same command resumes). Results go to stdout, the rest to
stderr.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from merge_cli.cli.analyze import analyze
from merge_cli.cli.compare import compare
from merge_cli.cli.convert import convert
from merge_cli.cli.evaluate import evaluate
from merge_cli.cli.extract_lora import extract_lora
from merge_cli.cli.init import init
from merge_cli.cli.methods import methods
from merge_cli.cli.push import push
from merge_cli.cli.run import plan, run
from merge_cli.errors import MergeCliError

app = typer.Typer(
    help="Merge language-model checkpoints: one recipe, one command, the same bytes every time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"merge-cli {version('merge-cli')}")
        raise typer.Exit


for verb in (init, run, plan, methods, analyze, evaluate, compare, push, convert, extract_lora):
    app.command()(verb)


def main() -> None:
    """Run the command line; every failure is one message and the exit code of its kind."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        # Verbs return nothing; typer answers a KeyboardInterrupt with the code 130.
        code = app(standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code)
    except MergeCliError as error:
        from merge_cli import console

        console.show_error(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is wrong, nobody is listening.
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        # Usage errors of click, of which typer has its own copy or not, depending on its version.
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()
        sys.exit(error.exit_code)


def _interrupt(number: int, frame: object) -> None:
    """Stop once: pressing Ctrl-C again must not break the closing of the journal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
