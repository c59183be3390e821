"""What the plan of a recipe that learns shows: data, teachers, coefficients, memory, reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.dam.start import start_candidates
from merge_cli.engine.residency import RESIDENCY
from merge_cli.recipe.training import Training
from merge_cli.system.machine import show_seconds, show_size
from merge_cli.system.terminal import print_wrapped

if TYPE_CHECKING:
    from merge_cli.dam.plan import TrainingPlan


def options_json() -> list[dict[str, Any]]:
    """Every option of `training:` with its default and what it does."""
    from merge_cli.recipe.training import Training, plain_training

    defaults = plain_training(Training())
    return [
        {"name": f.name, "default": defaults.get(f.name), "doc": f.metadata["help"]}
        for f in fields(Training)
    ]


def print_options(out: Console) -> None:
    """The same as text."""
    from merge_cli.recipe.training_presets import PRESETS

    out.print(f"\nOptions of `training:` (docs/dam.md). Presets: {', '.join(PRESETS)}.\n")
    for option in options_json():
        default = _yaml(option["default"])
        default = f" (default: {default})" if default else ""
        text = f"[bold]{option['name']}[/bold]: {escape(option['doc'] + default)}"
        print_wrapped(out, text, indent=2)


def _yaml(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_yaml(weight)}" for name, weight in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def training_json(decided: TrainingPlan) -> dict[str, Any]:
    """The training plan as data, for `--json`."""
    from merge_cli.recipe.training import plain_training

    return {
        "dials": plain_training(decided.training),
        "coefficients": decided.coefficients,
        "coefficients_from_whole": decided.coefficients_from_whole,
        "steps": decided.steps,
        "tokens": decided.tokens,
        "start": list(start_candidates(decided)),
        "statistics": {merge.method: merge.tokens for merge in decided.static},
        "datasets": [
            {
                "name": item.name,
                "teacher": decided.labels[item.source],
                "rows": item.rows,
                "train": len(item.train),
                "held_out": len(item.held_out),
                "removed": item.removed,
                "tokens": sum(example.counted for example in item.train),
                "cache_bytes": teacher.bytes,
                "not_cached": teacher.missing,
            }
            for item, teacher in zip(decided.datasets, decided.teachers, strict=True)
        ],
        "cache_bytes": sum(teacher_plan.bytes for teacher_plan in decided.teachers),
        "device": decided.device,
        "dtype": decided.dtype,
        "mode": decided.mode,
        "residency": decided.residency.residency,
        "source_bytes": decided.residency.bytes,
        "student_bytes": decided.student_bytes,
        "memory": decided.needs.to_json(),
        "peak": {"device": decided.peak.device, "host": decided.peak.host},
        "warnings": list(decided.warnings),
        "why": decided.why,
    }


def print_training(out: Console, decided: TrainingPlan) -> None:
    """The same as text."""
    training = decided.training
    out.print()
    about = f"(preset {training.preset}): {decided.steps:,} steps, about {decided.tokens:,} tokens"
    out.print(f"[bold]training before the merge[/bold] {about}")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("data")
    table.add_column("teacher", overflow="fold")
    for name in ("rows", "train", "held out", "tokens", "predictions", "not cached"):
        table.add_column(name, justify="right")
    for dataset, teacher in zip(decided.datasets, decided.teachers, strict=True):
        tokens = sum(example.counted for example in dataset.train)
        table.add_row(
            escape(dataset.name),
            escape(decided.labels[dataset.source]),
            f"{dataset.rows:,}",
            f"{len(dataset.train):,}",
            f"{len(dataset.held_out):,}",
            f"{tokens:,}",
            show_size(teacher.bytes),
            f"{teacher.missing:,}",
        )
    out.print(table)
    for dataset in decided.datasets:
        if dataset.removed:
            message = (
                f"{dataset.name}: {dataset.removed:,} rows are held out, too, and not trained on"
            )
            out.print(f"[yellow]![/yellow] {escape(message)}")
    cache = sum(item.bytes for item in decided.teachers)
    trained = sum(target.trained for target in decided.targets)
    frozen = len(decided.targets) - trained
    still = f"; {frozen} tensors stay as they start" if frozen else ""
    storage = f"on disk, the {training.top_k} likeliest tokens of each in {training.cache_dtype}"
    if training.top_k == "full":
        storage = "in memory, the whole vocabulary"
    unused = training.unused_patterns([target.name for target in decided.targets])
    lines = [f"granularity: no tensor has '{pattern}' in its name" for pattern in unused]
    for message in (*lines, *decided.warnings):
        out.print(f"[yellow]![/yellow] {escape(message)}", soft_wrap=True)
    for label, text in (
        (
            "coefficients",
            f"{decided.coefficients:,} numbers for {trained} tensors"
            f" ({granularity_in_words(training)}, {training.form}, "
            f"activation {training.activation}){still}{_more_from_whole(decided)}",
        ),
        ("start", _start_in_words(decided)),
        ("predictions", f"{show_size(cache)} {storage}"),
        (
            "student",
            f"{show_size(decided.student_bytes)} in {decided.dtype} "
            f"({decided.why['dtype']}) on {_with_reason(decided.why['device'])}",
        ),
        ("sources", f"{RESIDENCY[decided.residency.residency]}: {decided.why['residency']}"),
        ("memory", _memory_in_words(decided)),
        ("update", f"{decided.mode}: {decided.why['mode']}"),
        *([("rollouts", _rollouts_in_words(decided))] if training.rollouts else []),
    ):
        out.print(f"[dim]{label}:[/dim] {escape(text)}")


def _more_from_whole(decided: TrainingPlan) -> str:
    count = decided.coefficients_from_whole
    if count is None:
        return ""
    merges = " or ".join(merge.method for merge in decided.static)
    return f"; {count:,} if it starts at the merge of {merges}, where the base is a source, too"


def print_learned(out: Console, training: Mapping[str, Any]) -> None:
    """What training brought, and loudly where it brought nothing."""
    verdict, cost = training["verdict"], training["cost"]
    out.print(
        f"[green]✓[/green] learned {training['coefficients']:,} coefficients in "
        f"{training['steps']:,} steps, {show_seconds(cost['seconds'])}, {cost['tokens']:,} tokens"
    )
    if verdict is None:
        return
    better = verdict["ratio"] < 1
    mark = "[green]✓[/green]" if better else "[bold red]✗ no improvement:[/bold red]"
    out.print(
        f"{mark} held-out KL {verdict['kl']:.4g}; the best without training is "
        f"{escape(verdict['best_static'])}, {verdict['best_static_kl']:.4g}"
    )


def granularity_in_words(training: Training) -> str:
    """`column`, or `row for embed_tokens, column for the rest`."""
    if isinstance(training.granularity, str):
        return training.granularity
    parts = [
        f"{kind} for {'the rest' if pattern == '*' else pattern}"
        for pattern, kind in training.granularity.items()
    ]
    return ", ".join(parts if "*" in training.granularity else [*parts, "column for the rest"])


def _start_in_words(decided: TrainingPlan) -> str:
    """Where training begins, and what is measured for it."""
    start, candidates = decided.training.start, start_candidates(decided)
    if start == "best" and not candidates:
        return "1/sources: no rows are held out to choose by"
    which = "the best on held-out rows of" if start == "best" else f"{start}; compared with"
    words = f"{which} {', '.join(candidates)}" if candidates else f"{start}"
    for merge in decided.static:
        words += f"; {merge.method} looks at {merge.tokens:,} tokens"
    if decided.static:
        size = show_size(decided.plan.bytes_written)
        words += f"; where one of these is the start, OUT keeps it, too ({size})"
    return "; ".join(filter(None, [words, decided.why.get("start", "")]))


def _rollouts_in_words(decided: TrainingPlan) -> str:
    """What learning on-policy costs."""
    about, training = decided.training.rollouts, decided.training
    assert about is not None
    rows = sum(min(training.batch_size, len(dataset.train)) for dataset in decided.datasets)
    teachers, times = len(decided.datasets), -(-decided.steps // about.every)
    when = "every step" if about.every == 1 else f"every {about.every} steps"
    return (
        f"{when} {rows} rows are continued by up to {about.length} tokens, "
        f"{times * rows * about.length:,} in all; the student becomes each teacher in turn and "
        f"itself again ({teachers + 1} rewrites, no memory), one more backward pass, "
        f"{show_size(decided.needs.rollouts)} of predictions"
    )


def _memory_in_words(decided: TrainingPlan) -> str:
    needs, peak, training = decided.needs, decided.peak, decided.training
    checkpointed = ", checkpointed" if training.checkpointing else ""
    parts = [
        f"student {show_size(needs.student)}",
        f"activations {show_size(needs.activations)}{checkpointed}",
        f"gradients {show_size(needs.gradients)}",
        f"coefficients and moments {show_size(needs.coefficients)}",
        f"blocks and logits {show_size(needs.blocks)}",
    ]
    words = f"about {show_size(peak.host)} at the peak"
    if peak.device is not None:
        words = f"about {show_size(peak.device)} on the device and {show_size(peak.host)} on the "
        words += "host at the peak"
    return f"{words} ({', '.join(parts)}, sources {show_size(decided.residency.bytes)})"


def _with_reason(device: str) -> str:
    """`cpu: no CUDA device found` with the reason in parentheses."""
    name, _, reason = device.partition(": ")
    return f"{name} ({reason})" if reason else name
