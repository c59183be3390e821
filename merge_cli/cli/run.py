"""`merge-cli run` and `merge-cli plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.options import (
    AllOption,
    DataOption,
    DeviceOption,
    EvalOption,
    GateOption,
    JsonOption,
    MemoryOption,
    NoWorseOption,
    RecipeArgument,
    SeedOption,
    ShardOption,
    ThreadsOption,
    mergekit,
    switch,
    unneeded,
)
from merge_cli.errors import UsageError


def run(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = "1.25GB",
    shard_size: ShardOption = "5GB",
    seed: SeedOption = None,
    overwrite: Annotated[bool, switch("--overwrite", "Replace an existing OUT.")] = False,
    fresh: Annotated[bool, switch("--fresh", "Do not resume an interrupted run.")] = False,
    keep_stages: Annotated[
        bool, switch("--keep-stages", "Leave what a recipe's other documents make in OUT.stages.")
    ] = False,
    dry_run: Annotated[bool, switch("--dry-run", "Show the plan and stop.")] = False,
    no_stats: Annotated[bool, switch("--no-stats", "Do not measure the sources.")] = False,
    fsync: Annotated[bool, switch("--fsync", "Wait for the disk before publishing.")] = False,
    allow_non_finite: Annotated[
        bool, switch("--allow-non-finite", "Merge NaN and Inf as they are.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        switch(
            "--trust-remote-code/--no-trust-remote-code",
            "Copy the donor's Python files; nothing is run.",
        ),
    ] = False,
    require_improvement: Annotated[
        bool, switch("--require-improvement", "Fail if learning beats no static merge.")
    ] = False,
    tune: Annotated[
        list[str] | None,
        typer.Option(help="Find a number of the method on data: lambda=0:1. May be repeated."),
    ] = None,
    tune_on: Annotated[
        list[Path] | None, typer.Option(help="Text whose loss --tune makes small; repeatable.")
    ] = None,
    tune_evaluations: Annotated[int, typer.Option(help="Merges that --tune tries.", min=1)] = 12,
    eval_file: EvalOption = None,
    data: DataOption = None,
    gate: GateOption = None,
    no_worse: NoWorseOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet/--no-quiet", "-q", help="Only errors.", show_default=False)
    ] = False,
    cuda: Annotated[
        bool | None, mergekit("The same as --device cuda, or cpu.", "--cuda/--no-cuda")
    ] = None,
    gpu_rich: Annotated[
        bool | None, mergekit("The same as --cuda.", "--gpu-rich/--no-gpu-rich")
    ] = None,
    out_shard_size: Annotated[
        str | None, mergekit("--shard-size as mergekit writes it (5B).", "--out-shard-size")
    ] = None,
    copy_tokenizer: Annotated[
        bool, mergekit("Copy the tokenizer.", "--copy-tokenizer/--no-copy-tokenizer")
    ] = True,
    write_model_card: Annotated[
        bool, mergekit("Write README.md.", "--write-model-card/--no-write-model-card")
    ] = True,
    unsafe_truncate_embeddings: Annotated[
        bool,
        mergekit(
            "Cut vocabularies to the smallest, whatever its tokens are.",
            "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
        ),
    ] = False,
    transformers_cache: Annotated[
        str | None, mergekit("Where models of the Hub are kept.", "--transformers-cache")
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
    """Merge: the whole job, from a recipe to a model with a report."""
    from merge_cli import console
    from merge_cli.cli import mergekit_flags
    from merge_cli.planning.planner import load_recipe
    from merge_cli.system.machine import parse_size

    given = dict(locals())
    if out is None and not dry_run:
        raise UsageError("where to? OUT is missing", hint="merge-cli run RECIPE OUT")
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
    if tune or tune_on:
        from merge_cli.evolve.tuning import tuned

        loaded = tuned(loaded, tune or [], tune_on or [], tune_evaluations)
    screen = console.Screen(quiet=quiet)
    screen.notes([*lines, *loaded.warnings])

    from merge_cli.api import merge_plan
    from merge_cli.engine.merge import check_target
    from merge_cli.evaluation.quality_check import quality_check
    from merge_cli.evaluation.run import spec_of
    from merge_cli.options import MergeOptions
    from merge_cli.planning.stages import plan_recipe

    spec = spec_of(eval_file, data or []) if eval_file or data else None
    check = quality_check(loaded, spec, gate or [], no_worse or [])
    plan = plan_recipe(loaded, shard_size=shard_bytes)
    if check is not None:
        screen.notes(check.check(plan))
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
    )
    if dry_run or out is None:
        if out is not None:
            check_target(plan, out, options)
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
    """Show what a merge would do, from headers alone: tensors, bytes, memory, every problem."""
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
    check = quality_check(loaded, None, (), ()) if loaded.output is None else None
    decided = plan_recipe(loaded, shard_size=shard_bytes)
    if check is not None:
        screen.notes(check.check(decided))
    options = MergeOptions(device=device, threads=threads, max_memory=memory)
    screen.plan(decided, options, every=every, as_json=as_json)
