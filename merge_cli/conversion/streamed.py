"""Converting what a merge can read as it is: a file of weights, a distributed checkpoint.

It is a merge of one model that copies: the engine streams it in bounded memory and resumes. What is
written has the names, shapes and config of a class that transformers knows, or is refused; a file
without a config becomes one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import check_links
from merge_cli.checkpoint.class_config import UnknownClass
from merge_cli.checkpoint.dtypes import MERGEABLE, SAFETENSORS_NAMES
from merge_cli.checkpoint.fingerprint import folder_fingerprints
from merge_cli.engine.merge import execute
from merge_cli.errors import MismatchError, Problem, UsageError
from merge_cli.formats.dcp.files import METADATA
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.skeleton import Skeleton, build
from merge_cli.recipe.reference import hub_file, is_address, local_folder, parse_reference
from merge_cli.sources.opening import open_source, open_tokenizer
from merge_cli.sources.single_file import NO_CONFIG
from merge_cli.sources.source import Source

_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Written:
    """What a conversion has written: its plan, its bytes, and what a reader should know."""

    plan: Plan
    bytes: int
    notes: tuple[str, ...]


def is_streamed(model: str) -> bool:
    """Whether a model is one that the engine reads: a file, an address, or a DCP folder."""
    path = local_folder(model, Path.cwd())
    if path is None:
        name = parse_reference(model, Path.cwd()).path
        return is_address(name) or hub_file(name) is not None
    return not path.is_dir() or (path / METADATA).is_file()


def convert_streamed(
    model: str,
    out: Path,
    *,
    dtype: str,
    config: str,
    options: MergeOptions,
    on_progress: Callable[[Progress], None],
) -> Written:
    """Write a model as safetensors.

    Args:
        dtype: torch's name of the output's; empty for the model's own, bfloat16 where it is
            quantised.
        config: a model whose config and tokenizer the output has; empty for its own.

    Raises:
        UsageError: a dtype that is none, or no config.
        SourceError, MismatchError: the model cannot be read, or its class would not open it.
        ResourceError, Interrupted: as `engine.merge.execute` does.
    """
    plan, notes = plan_conversion(model, dtype=dtype, config=config)
    execute(plan, out, options, on_progress=on_progress, finish=lambda *_: None)
    return Written(plan, sum(task.bytes_written for task in plan.tasks), notes)


def plan_conversion(model: str, *, dtype: str, config: str) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a merge that copies one model, held against its class; and its notes.

    Raises:
        as `convert_streamed` does, before anything is written.
    """
    if dtype and SAFETENSORS_NAMES.get(dtype) not in MERGEABLE:
        message = f"'{dtype}' is no dtype that weights are written in"
        raise UsageError(message, hint="Use float32, bfloat16 or float16.")
    here = Path.cwd()
    source = open_source(parse_reference(model, here), here)
    giver = open_tokenizer(parse_reference(config, here), here) if config else None
    if giver is not None:
        check_links(giver.root, giver.root, (giver.label, giver.label))
        giver = replace(giver, fingerprints=folder_fingerprints(giver.root))
        source = replace(source, config=giver.config)
    if not source.config and not source.is_lone_file:
        message = "there is no config.json with it"
        hint = "Say which model it is: --config MODEL takes config and tokenizer from there."
        raise UsageError(message, where=model, hint=hint)
    about = {"merge_method": "passthrough", "models": [{"model": model}]}
    text = json.dumps(about | ({"dtype": dtype} if dtype else {}))
    recipe = replace(load_recipe("conversion", text=text), file="")
    plan = make_plan(recipe, made={str(recipe.models[0].model): source})
    if giver is not None:
        aligned = replace(plan.aligned, tokenizer_index=1)
        plan = replace(plan, sources=(*plan.sources, giver), config_index=1, aligned=aligned)
    notes = [note for note in source.notes if not (giver and note == NO_CONFIG)]
    return plan, (*notes, *(_checked(plan, source) if plan.config else ()))


def _checked(plan: Plan, source: Source) -> list[str]:
    """Hold what will be written against the class that its config names.

    Raises:
        MismatchError: tensors that are missing, of other shapes, or that the class has not.
    """
    try:
        made = build(plan.config, {task.name: task.shape for task in plan.tasks})
    except UnknownClass as reason:
        return [f"whether the output opens could not be checked: {reason}"]
    problems = list(_problems(made))
    if problems:
        summary = f"{made.name} would not open what {source.label} holds"
        raise MismatchError([Problem(problem) for problem in problems], summary)
    return []


def _problems(made: Skeleton) -> list[str]:
    if made.failure:
        return [f"it refuses config.json or the tensors: {made.failure}"]
    wrong = [
        f"{name} {list(stored)}, not {list(expected)}"
        for name, (stored, expected) in made.wrong.items()
    ]
    kinds = {
        "tensors are missing": sorted(made.missing),
        "tensors are not the model's": sorted(made.unexpected),
        "tensors have other shapes": sorted(wrong),
    }
    return [
        f"{len(names)} {problem}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for problem, names in kinds.items()
        if names
    ]
