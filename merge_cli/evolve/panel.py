"""What the plan of a recipe that searches shows, and what a search has found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.engine.residency import RESIDENCY
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.task import DataTask
from merge_cli.evolve.checks import GREEDY
from merge_cli.evolve.layer_space import LayerSpace
from merge_cli.evolve.objectives import Split
from merge_cli.evolve.verdict import verdict_in_words
from merge_cli.recipe.search import WITHOUT_SPACE, Search
from merge_cli.system.machine import show_seconds, usable_cores

if TYPE_CHECKING:
    from merge_cli.evolve.plan import SearchPlan

# For estimates in plans: of text in small vocabularies, and of a forward pass on a CPU.
_BYTES_OF_TOKEN, _FLOPS_OF_CORE = 2.5, 3e10


def search_json(decided: SearchPlan) -> dict[str, Any]:
    """The search as data, for `--json`."""
    space = decided.space
    return {
        "optimizer": decided.search.optimizer if space else "greedy",
        "evaluations": decided.evaluations,
        "static": [
            {"name": merge.name, "in_space": bool(merge.genome)} for merge in decided.statics
        ],
        "population": decided.population,
        "genome": [
            {"sets": space.describe(gene), "range": gene.searched.allowed} for gene in space.genes
        ]
        if space
        else [],
        **(
            {"layers": {"min": space.least, "max": space.most, "each": space.layers}}
            if isinstance(space, LayerSpace)
            else {}
        ),
        "objective": {
            name: [
                {"task": task.name, "kind": task.kind, "weight": goal.weight, "constraint": word}
                for task, goal, word in zip(
                    split.spec.tasks, split.goals, map(_constraint, split.goals), strict=True
                )
            ]
            for name, split in decided.objective.splits.items()
        },
        "validated": _validated(decided),
        "tokens": _tokens(decided),
        "residency": decided.residency.residency,
        "why": decided.residency.reason,
        "warnings": list(decided.warnings),
    }


def print_search(out: Console, decided: SearchPlan) -> None:
    """What every number of the genome means, and what candidates are judged by."""
    space, search = decided.space, decided.search
    out.print()
    if space is None:
        out.print(
            f"[bold]before the merge, a greedy search[/bold] for the members of the soup: "
            f"at most {decided.evaluations} evaluations"
        )
    else:
        method = " or ".join(search.method)
        out.print(
            f"[bold]before the merge, a search[/bold] of {escape(method)} by {search.optimizer}: "
            f"{len(space)} number{'s' * (len(space) != 1)}, {search.evaluations} evaluations in "
            f"generations of {decided.population}"
            f"{_first(decided)}"
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("number", "sets", "range"):
            table.add_column(name, overflow="fold")
        for i, gene in enumerate(space.genes):
            table.add_row(str(i), escape(space.describe(gene)), escape(gene.searched.allowed))
        out.print(table)
        if isinstance(space, LayerSpace):
            out.print(
                f"2^{len(space)} stacks of layers; the result has {space.least} to {space.most} "
                f"layers, each model {space.layers}"
            )
        elif len(space.sizes) > 1 and not search.smooth:
            out.print("tensors outside the layers go with the first group")
    for name, split in decided.objective.splits.items():
        goals = [
            f"{task.name} ({task.kind}{'.' + goal.metric if goal.metric else ''}"
            f"{f', weight {goal.weight:g}' if goal.weight != 1 else ''}{_constraint(goal)})"
            for task, goal in zip(split.spec.tasks, split.goals, strict=True)
        ]
        out.print(f"  {name}: {escape(', '.join(goals))}")
    if decided.calibration is not None:
        tokens = sum(part.examples.tokens for part in decided.calibration.parts)
        out.print(f"  Fisher merging looks at the models' data first: {tokens:,} tokens")
    out.print(f"  in all: {_amount(decided)}")
    count = search.workers
    out.print(
        f"  workers: {count} ({search.engine}); sources {RESIDENCY[decided.residency.residency]}: "
        f"{escape(decided.residency.reason)}"
    )
    for line in decided.warnings:
        out.print(f"[dim]note:[/dim] {escape(line)}")


def print_searched(out: Console, search: Mapping[str, Any]) -> None:
    """What a search brought, and loudly where it brought nothing."""
    cost, verdict = search["cost"], search["verdict"]
    failed = f", {cost['failed']} failed" if cost["failed"] else ""
    out.print(
        f"[green]✓[/green] {cost['evaluations']} candidates in {show_seconds(cost['seconds'])}"
        f"{failed}, {cost['tokens']:,} tokens; {escape(search['ended'])}"
    )
    if verdict is None:
        return
    mark = "[bold red]✗ NO IMPROVEMENT:[/bold red]"
    if verdict["better"]:
        mark = "[green]✓[/green]" if verdict.get("confirmed") else "[bold]–[/bold]"
    out.print(f"{mark} {escape(verdict_in_words(search))}")


def print_keys(out: Console, method: str) -> None:
    """The keys of the section `search:` that a method takes; docs/evolve.md explains them."""
    out.print("\nJudged by `objective:`, a list of evaluation tasks. Keys of `search:`:")
    for field in fields(Search):
        if "help" in field.metadata and (method != GREEDY or field.name in WITHOUT_SPACE):
            out.print(f"\n  [bold]{field.name}[/bold]")
            out.print(f"      {escape(field.metadata['help'])}")


def _validated(decided: SearchPlan) -> int:
    """How many merges are compared on the rows of the choice."""
    if decided.space is None or decided.objective.final is None:
        return 0
    return len(decided.statics) + min(decided.search.finalists, decided.search.evaluations)


def _tokens(decided: SearchPlan) -> int:
    """About how many tokens of loss and kl tasks a search scores: from the rows' bytes."""
    objective, final = decided.objective, decided.objective.final
    searched = decided.evaluations * _row_tokens(objective.search)
    chosen = _validated(decided) * _row_tokens(final) if final else 0
    return searched + chosen


def _row_tokens(split: Split) -> int:
    count = 0.0
    longest = split.spec.max_length or math.inf
    for task in split.spec.tasks:
        if isinstance(task, DataTask):
            rows = read_rows(task.data)
            used = len(rows) if task.limit is None else min(task.limit, len(rows))
            tokens = task.data.stat().st_size / max(len(rows), 1) / _BYTES_OF_TOKEN
            # Longer rows are scored in windows that overlap by half.
            count += used * tokens * (2 if tokens > longest else 1)
    return round(count)


def _amount(decided: SearchPlan) -> str:
    """Evaluations, tokens, and about how long on these cores."""
    tokens = _tokens(decided)
    parameters = sum(math.prod(task.shape) for task in decided.plan.tasks)
    text = f"{decided.evaluations} evaluations on the split search"
    if _validated(decided):
        text += f", {_validated(decided)} to choose the result"
    text += f"; about {tokens:,} tokens"
    if decided.on_cpu:
        cores = usable_cores()
        seconds = 2.0 * parameters * tokens / (_FLOPS_OF_CORE * cores)
        text += f", about {show_seconds(seconds)} on {cores} core{'s' * (cores != 1)}"
    return text


def _first(decided: SearchPlan) -> str:
    """How many static merges come first."""
    count = len(decided.statics)
    in_space = sum(bool(merge.genome) for merge in decided.statics)
    return f", after {count} static merges ({in_space} of them in its space)" if count else ""


def _constraint(goal: Any) -> str:
    result = ""
    if goal.at_most is not None:
        result += f", at most {goal.at_most:g}"
    if goal.at_least is not None:
        result += f", at least {goal.at_least:g}"
    if goal.no_worse_than:
        margin = f" + {goal.margin:g}" if goal.margin else ""
        result += f", no worse than {goal.no_worse_than}{margin}"
    return result
