"""`merge-cli evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.help import EVALUATION, RESOURCES
from merge_cli.cli.options import (
    DataOption,
    DeviceOption,
    EvalOption,
    GateOption,
    JsonOption,
    LimitOption,
    ModelDtypeOption,
    ModelMemoryOption,
    NoWorseOption,
    QuietOption,
    ThreadsOption,
    switch,
)
from merge_cli.errors import UsageError


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model to evaluate: a folder or a Hub id.")
    ],
    data: DataOption = None,
    eval_file: EvalOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this model on the same examples. Repeatable.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    gate: GateOption = None,
    no_worse: NoWorseOption = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the result of every example to FILE, as JSON lines.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    dtype: ModelDtypeOption = None,
    max_memory: ModelMemoryOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Context length in tokens. Default: the model's own, at most 4096.",
            min=2,
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens in a batch, with padding. Default: 8192.",
            min=1,
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    limit: LimitOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Seed of the samples of rows.",
            min=0,
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    no_cache: Annotated[bool, switch("--no-cache", "Do not use or fill the cache.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate a model: loss, accuracy and exact match, with confidence intervals."""
    from merge_cli import console
    from merge_cli.evaluation.gates import check_gates, read_gates, require
    from merge_cli.evaluation.run import evaluate_all, spec_of, write_examples
    from merge_cli.evaluation.summary import summary
    from merge_cli.sources.result_files import check_writable
    from merge_cli.system.machine import parse_size

    spec = spec_of(eval_file, data or []).changed(
        device=device,
        threads=threads,
        dtype=dtype,
        max_length=max_length,
        batch_tokens=batch_tokens,
        seed=seed,
        memory=parse_size(max_memory, "--max-memory") if max_memory else None,
        cache=False if no_cache else None,
    )
    spec = spec.limited(limit)
    results = {"--examples": examples}
    check_writable(results)
    gates = read_gates(gate or [], no_worse or [], spec.tasks)
    screen = console.Screen(quiet=quiet)
    others = against or []
    names_of = {g.reference: _named_by(g.reference, others) for g in gates if g.reference}
    names = list(dict.fromkeys([model, *others, *names_of.values()]))
    with screen.steps() as on_progress:
        evaluations = evaluate_all(names, spec, on_progress, results=results)
    rows = summary(list(evaluations.values()))
    if as_json:
        console.print_json(json.dumps(rows, ensure_ascii=False))
    else:
        screen.evaluations(rows)
    if examples is not None:
        write_examples(evaluations.items(), examples)
    references = {name: evaluations[named] for name, named in names_of.items()}
    require({model: check_gates(gates, evaluations[model], references)})


def _named_by(name: str, others: list[str]) -> str:
    """The model that a gate's name means: `base` is the one given as `--against zoo/base`.

    Raises:
        UsageError: none of those, and neither a folder nor the id of a model.
    """
    named = next((o for o in others if name in (o, Path(o).name)), name)
    if named == name and name not in others and "/" not in name and not Path(name).is_dir():
        message = f"a gate compares with '{name}', which is none of the models of --against"
        raise UsageError(message, hint=f"Add --against FOLDER/{name}.")
    return named
