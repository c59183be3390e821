"""`merge-cli run` and `merge-cli plan`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.help import EVALUATION
from merge_cli.cli.options import (
    AllOption,
    DataOption,
    DeviceOption,
    EvalOption,
    GateOption,
    JsonOption,
    MemoryOption,
    NoWorseOption,
    RayOption,
    RecipeArgument,
    SeedOption,
    ShardOption,
    ThreadsOption,
    mergekit,
    switch,
    unneeded,
)
from merge_cli.errors import UsageError
from merge_cli.system.garbage import keep_to_the_end

TUNING = "Tuning"
_PLANNING = "reading headers, configs and tokenizers"


def run(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT", help="The folder to write. Must not exist, or give --overwrite."
        ),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = "1.25GB",
    ray: RayOption = None,
    shard_size: ShardOption = "5GB",
    seed: SeedOption = None,
    overwrite: Annotated[bool, switch("--overwrite", "Replace an existing OUT.")] = False,
    fresh: Annotated[bool, switch("--fresh", "Start over instead of resuming.")] = False,
    keep_stages: Annotated[
        bool,
        switch("--keep-stages", "Keep the models of a recipe's other documents in OUT.stages."),
    ] = False,
    dry_run: Annotated[bool, switch("--dry-run", "Show the plan and stop.")] = False,
    no_stats: Annotated[
        bool, switch("--no-stats", "Leave the statistics of the sources out of the report.")
    ] = False,
    fsync: Annotated[
        bool, switch("--fsync", "Write to the disk before OUT appears; slower.")
    ] = False,
    allow_non_finite: Annotated[
        bool, switch("--allow-non-finite", "Merge weights that are NaN or Inf.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        switch(
            "--trust-remote-code/--no-trust-remote-code",
            "Copy the Python files of the config's model. They are not run.",
        ),
    ] = False,
    require_improvement: Annotated[
        bool,
        switch(
            "--require-improvement",
            "Exit with code 5 if a learned or searched merge beats no simple one.",
            EVALUATION,
        ),
    ] = False,
    accept_best: Annotated[
        bool,
        switch(
            "--accept-best",
            "Publish the best that `auto` has found so far where Ctrl-C stops it, or has before.",
        ),
    ] = False,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RANGE",
            help="Choose a parameter by its loss on --tune-on: lambda=0:1. Repeatable.",
            rich_help_panel=TUNING,
        ),
    ] = None,
    tune_on: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text on which --tune minimizes the loss. Repeatable.",
            rich_help_panel=TUNING,
        ),
    ] = None,
    tune_evaluations: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of values that --tune tries.",
            show_default="12",
            min=1,
            rich_help_panel=TUNING,
        ),
    ] = None,
    eval_file: EvalOption = None,
    data: DataOption = None,
    gate: GateOption = None,
    no_worse: NoWorseOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet/--no-quiet", "-q", help="Print errors only.", show_default=False),
    ] = False,
    cuda: Annotated[
        bool | None, mergekit("Short for --device cuda, or --device cpu.", "--cuda/--no-cuda")
    ] = None,
    gpu_rich: Annotated[
        bool | None, mergekit("Short for --cuda.", "--gpu-rich/--no-gpu-rich")
    ] = None,
    out_shard_size: Annotated[
        str | None,
        mergekit("--shard-size in mergekit's units (5B).", "--out-shard-size", metavar="SIZE"),
    ] = None,
    copy_tokenizer: Annotated[
        bool, mergekit("Do not write tokenizer files.", "--copy-tokenizer/--no-copy-tokenizer")
    ] = True,
    write_model_card: Annotated[
        bool,
        mergekit(
            "Do not write README.md, the model card.", "--write-model-card/--no-write-model-card"
        ),
    ] = True,
    unsafe_truncate_embeddings: Annotated[
        bool,
        mergekit(
            "Cut every vocabulary to the size of the smallest.",
            "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
        ),
    ] = False,
    transformers_cache: Annotated[
        str | None,
        mergekit("Keep downloads in this folder.", "--transformers-cache", metavar="FOLDER"),
    ] = None,
    lazy_unpickle: Annotated[bool | None, unneeded("lazy-unpickle")] = None,
    allow_crimes: Annotated[bool | None, unneeded("allow-crimes")] = None,
    low_cpu_memory: Annotated[bool | None, unneeded("low-cpu-memory")] = None,
    read_to_gpu: Annotated[bool | None, unneeded("read-to-gpu")] = None,
    multi_gpu: Annotated[bool | None, unneeded("multi-gpu")] = None,
    async_write: Annotated[bool | None, unneeded("async-write")] = None,
    clone_tensors: Annotated[bool | None, unneeded("clone-tensors")] = None,
    safe_serialization: Annotated[bool | None, unneeded("safe-serialization")] = None,
    write_threads: Annotated[int | None, typer.Option(hidden=True)] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(hidden=True)] = None,
    lora_merge_dtype: Annotated[str | None, typer.Option(hidden=True)] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, hidden=True)] = 0,
) -> None:
    """Run a recipe: write the merged model, its model card and a report."""
    from merge_cli import console
    from merge_cli.cli import mergekit_flags
    from merge_cli.planning.planner import load_recipe
    from merge_cli.system.machine import parse_size

    given = dict(locals())
    if out is None and not dry_run:
        raise UsageError(
            "missing argument OUT: the folder to write", hint="merge-cli run RECIPE OUT"
        )
    device = mergekit_flags.device_of(device, cuda, gpu_rich, multi_gpu)
    if transformers_cache is not None:
        mergekit_flags.use_cache(transformers_cache)
    lines = mergekit_flags.answers(given)
    shard_bytes = parse_size(shard_size, "--shard-size")
    if out_shard_size is not None:
        shard_bytes, line = mergekit_flags.shard_bytes(out_shard_size)
        lines += [line] if line else []
    memory = parse_size(max_memory, "--max-memory")
    loaded = load_recipe(recipe)
    if seed is not None:
        loaded = loaded.with_seed(seed)
    if unsafe_truncate_embeddings:
        loaded, more = mergekit_flags.truncating(loaded)
        lines += more
    if tune or tune_on or tune_evaluations:
        from merge_cli.evolve.tuning import EVALUATIONS, tuned

        loaded = tuned(loaded, tune or [], tune_on or [], tune_evaluations or EVALUATIONS)
    screen = console.Screen(quiet=quiet)
    screen.notes([*lines, *loaded.warnings])

    from merge_cli.documents import merge_plan, on_cluster, runner_for
    from merge_cli.engine.merge import check_target
    from merge_cli.options import MergeOptions
    from merge_cli.planning.stages import plan_recipe

    check = None
    if eval_file or data or gate or no_worse or loaded.eval:  # a plain merge imports none of this
        from merge_cli.evaluation.quality_check import quality_check
        from merge_cli.evaluation.run import spec_of

        spec = spec_of(eval_file, data or []) if eval_file or data else None
        check = quality_check(loaded, spec, gate or [], no_worse or [])
    options = MergeOptions(
        device=device,
        threads=threads,
        max_memory=memory,
        overwrite=overwrite,
        fresh=fresh,
        statistics=not no_stats,
        fsync=fsync,
        allow_non_finite=allow_non_finite,
        trust_remote_code=trust_remote_code,
        copy_tokenizer=copy_tokenizer,
        model_card=write_model_card,
        keep_stages=keep_stages,
        accept_best=accept_best,
        ray=ray,
    ).on_engine(loaded.engine)
    with ExitStack() as cluster:
        if options.ray is not None:
            with screen.doing("reaching the Ray cluster"):
                cluster.enter_context(on_cluster(options))
        with screen.doing(_PLANNING):
            plan = plan_recipe(loaded, shard_size=shard_bytes)
            keep_to_the_end()  # a plan of a million objects
            notes = check.check(plan, out) if check is not None else ()
        screen.notes(notes)
        if dry_run or out is None:
            if out is not None:
                check_target(plan, out, options)
                with runner_for(plan, options, out):  # checks the cluster's nodes, too
                    pass
            screen.plan(plan, options, every=False, as_json=as_json)
            return
        stages = [f"{name}: {note}" for name, stage in plan.stages.items() for note in stage.notes]
        screen.notes([*stages, *plan.notes])
        with screen.progress() as on_progress:
            result = merge_plan(
                plan,
                out,
                options,
                on_progress,
                require_improvement=require_improvement,
                resume_evaluation=check is not None,
            )
    if not result.report:  # one of several processes that trained; the first one goes on
        return
    if check is None:
        screen.result(result, out, as_json=as_json)
        return
    if not as_json:
        screen.result(result, out)
    with screen.steps() as on_evaluation:
        models = check.run(plan, result.path, options, on_evaluation)
    if as_json:
        console.print_json(json.dumps({**result.report, "evaluation": models}, ensure_ascii=False))
    else:
        screen.evaluations(models)
    check.require()


def plan(
    recipe: RecipeArgument,
    shard_size: ShardOption = "5GB",
    device: DeviceOption = "auto",
    max_memory: MemoryOption = "1.25GB",
    threads: ThreadsOption = None,
    every: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a recipe would do and every problem in it, without reading weights."""
    from merge_cli import console
    from merge_cli.evaluation.quality_check import quality_check
    from merge_cli.options import MergeOptions
    from merge_cli.planning.planner import load_recipe
    from merge_cli.planning.stages import plan_recipe
    from merge_cli.system.machine import parse_size

    screen = console.Screen()
    shard_bytes = parse_size(shard_size, "--shard-size")
    memory = parse_size(max_memory, "--max-memory")
    loaded = load_recipe(recipe)
    screen.notes(loaded.warnings)
    options = MergeOptions(device=device, threads=threads, max_memory=memory)
    options = options.on_engine(loaded.engine)
    with screen.doing(_PLANNING):
        check = quality_check(loaded, None, (), ()) if loaded.output is None else None
        decided = plan_recipe(loaded, shard_size=shard_bytes)
        keep_to_the_end()  # as in `run`
        notes = check.check(decided) if check is not None else ()
    screen.notes(notes)
    screen.plan(decided, options, every=every, as_json=as_json)
