"""The command line: each verb parses, calls the library, shows. No logic, nothing heavy to import.

Exit codes: 0 done; 1 unexpected; 2 recipe or usage; 3 an input model or data file; 4 resources;
5 a quality gate; 130 interrupted (the same command resumes). Results go to stdout, the rest to
stderr.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from merge_cli.errors import MergeCliError, UsageError

app = typer.Typer(
    help="Merge language-model checkpoints: one recipe, one command, the same bytes every time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="The recipe's file; - reads standard input.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", "--random-seed", help="Instead of the recipe's seed.", min=0)
]
ShardOption = Annotated[str, typer.Option(help="Bytes of tensors in one output file.")]
MemoryOption = Annotated[str, typer.Option(help="What the whole process should stay under.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", "--num-threads", "-j", min=1, help="Default: every usable core."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AllOption = Annotated[bool, typer.Option("--all", help="Show every tensor.")]


def _switch(name: str, text: str) -> Any:
    """A flag that is off unless given, without a `--no-` twin."""
    return typer.Option(name, help=text, show_default=False)


def _mergekit(text: str, *names: str) -> Any:
    """A flag of mergekit-yaml that is honoured."""
    return typer.Option(*names, help=text, rich_help_panel="mergekit's flags", show_default=False)


def _unneeded(name: str) -> Any:
    """A flag of mergekit-yaml that is answered in one line (`mergekit_flags`)."""
    return typer.Option(f"--{name}/--no-{name}", hidden=True)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"merge-cli {version('merge-cli')}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = "1.25GB",
    shard_size: ShardOption = "5GB",
    seed: SeedOption = None,
    overwrite: Annotated[bool, _switch("--overwrite", "Replace an existing OUT.")] = False,
    fresh: Annotated[bool, _switch("--fresh", "Do not resume an interrupted run.")] = False,
    dry_run: Annotated[bool, _switch("--dry-run", "Show the plan and stop.")] = False,
    no_stats: Annotated[bool, _switch("--no-stats", "Do not measure the sources.")] = False,
    fsync: Annotated[bool, _switch("--fsync", "Wait for the disk before publishing.")] = False,
    allow_non_finite: Annotated[
        bool, _switch("--allow-non-finite", "Merge NaN and Inf as they are.")
    ] = False,
    trust_remote_code: Annotated[
        bool, _switch("--trust-remote-code", "Copy the donor's Python files; nothing is run.")
    ] = False,
    require_improvement: Annotated[
        bool, _switch("--require-improvement", "Fail if learning beats no static merge.")
    ] = False,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only errors.", show_default=False)
    ] = False,
    cuda: Annotated[bool, _mergekit("The same as --device cuda.", "--cuda", "--gpu-rich")] = False,
    out_shard_size: Annotated[
        str | None, _mergekit("--shard-size in parameters (5B).", "--out-shard-size")
    ] = None,
    copy_tokenizer: Annotated[
        bool, _mergekit("Copy the tokenizer.", "--copy-tokenizer/--no-copy-tokenizer")
    ] = True,
    lazy_unpickle: Annotated[bool, _unneeded("lazy-unpickle")] = False,
    allow_crimes: Annotated[bool, _unneeded("allow-crimes")] = False,
    low_cpu_memory: Annotated[bool, _unneeded("low-cpu-memory")] = False,
    read_to_gpu: Annotated[bool, _unneeded("read-to-gpu")] = False,
    multi_gpu: Annotated[bool, _unneeded("multi-gpu")] = False,
    async_write: Annotated[bool, _unneeded("async-write")] = False,
    clone_tensors: Annotated[bool, _unneeded("clone-tensors")] = False,
    safe_serialization: Annotated[bool, _unneeded("safe-serialization")] = False,
    write_model_card: Annotated[bool, _unneeded("write-model-card")] = False,
    unsafe_truncate_embeddings: Annotated[bool, _unneeded("unsafe-truncate-embeddings")] = False,
    write_threads: Annotated[int | None, typer.Option(hidden=True)] = None,
    transformers_cache: Annotated[str | None, typer.Option(hidden=True)] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(hidden=True)] = None,
    lora_merge_dtype: Annotated[str | None, typer.Option(hidden=True)] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, hidden=True)] = 0,
) -> None:
    """Merge: the whole job, from a recipe to a model with a report."""
    from merge_cli import console, mergekit_flags
    from merge_cli.engine.planner import load_recipe
    from merge_cli.sizes import parse_size

    given = dict(locals())
    if out is None and not dry_run:
        raise UsageError("where to? OUT is missing", hint="merge-cli run RECIPE OUT")
    if cuda and device not in ("auto", "cuda"):
        raise UsageError(f"--cuda and --device {device} contradict each other")
    lines = mergekit_flags.answers(given)
    shard_bytes = parse_size(shard_size, "--shard-size")
    if out_shard_size is not None:
        shard_bytes, line = mergekit_flags.shard_bytes(out_shard_size)
        lines += [line] if line else []
    memory = parse_size(max_memory, "--max-memory")
    loaded = load_recipe(recipe)
    if seed is not None:
        loaded = loaded.with_seed(seed)
    screen = console.Screen(quiet=quiet)
    screen.notes([*lines, *loaded.warnings])

    from merge_cli.api import merge
    from merge_cli.engine.merge import check_target
    from merge_cli.engine.options import MergeOptions
    from merge_cli.engine.planner import make_plan

    plan = make_plan(loaded, shard_size=shard_bytes)
    options = MergeOptions(
        device="cuda" if cuda else device,
        threads=threads,
        max_memory=memory,
        overwrite=overwrite,
        fresh=fresh,
        statistics=not no_stats,
        fsync=fsync,
        allow_non_finite=allow_non_finite,
        trust_remote_code=trust_remote_code,
        copy_tokenizer=copy_tokenizer,
    )
    if dry_run or out is None:
        if out is not None:
            check_target(plan, out, options)
        screen.plan(plan, options, every=False, as_json=as_json)
        return
    screen.notes([*plan.notes])
    with screen.progress() as show:
        result = merge(
            plan, out, shard_size=shard_bytes, options=options, show=show,
            require_improvement=require_improvement,
        )  # fmt: skip
    screen.result(result, out, as_json=as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    shard_size: ShardOption = "5GB",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = "1.25GB",
    threads: ThreadsOption = None,
    every: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a merge would do, from headers alone: tensors, bytes, memory, every problem."""
    from merge_cli import console
    from merge_cli.engine.options import MergeOptions
    from merge_cli.engine.planner import load_recipe, make_plan
    from merge_cli.sizes import parse_size

    screen = console.Screen()
    shard_bytes = parse_size(shard_size, "--shard-size")
    memory = parse_size(max_memory, "--max-memory")
    loaded = load_recipe(recipe)
    screen.notes(loaded.warnings)
    decided = make_plan(loaded, shard_size=shard_bytes)
    options = MergeOptions(device=device, threads=threads, max_memory=memory)
    screen.plan(decided, options, every=every, as_json=as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its parameters.")] = None,
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


def main() -> None:
    """Run the command line; every failure is one message and the exit code of its kind."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=False)
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
