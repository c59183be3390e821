"""The output of commands: results to stdout, everything else to stderr.

A terminal gets colours and progress bars; a batch log gets plain lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from merge_cli.console.adapters import print_merged
from merge_cli.console.analysis import print_analysis
from merge_cli.console.methods import explained_json, print_method, print_methods
from merge_cli.console.plain import PlainConsole, print_json
from merge_cli.console.plans import forecast, plan_document
from merge_cli.console.progress import ProgressLog, progress_bar
from merge_cli.console.tables import (
    Settings,
    indented,
    method_json,
    plan_row,
    print_table,
)
from merge_cli.errors import MergeCliError, ProblemsError
from merge_cli.planning.preparation import preparations
from merge_cli.system.machine import show_seconds, show_size
from merge_cli.system.notices import send_notices
from merge_cli.system.terminal import print_wrapped

if TYPE_CHECKING:
    from merge_cli.analysis.result import Analysis
    from merge_cli.chat.answers import Answer, Sampling
    from merge_cli.chat.conversation import Conversation
    from merge_cli.chat.prompts import Prompt
    from merge_cli.demo.run import Demo
    from merge_cli.documents import MergeResult
    from merge_cli.evaluation.live import LiveModel
    from merge_cli.methods.method import Method
    from merge_cli.options import MergeOptions, Progress
    from merge_cli.planning.plan import Plan

_MAX_PROBLEMS = (
    24  # beyond that half as many problems are shown, so that the first is still visible
)
_TIMED = 1e9  # bytes: a smaller merge is mostly start-up, and its rate says nothing


class Screen:
    """The output of one command; `quiet` prints only results and errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        # In a file or a pipe a table may be as wide as it needs: nothing there folds it.
        width = None if sys.stdout.isatty() else 240
        # No emoji: `recipe.yaml:100:1` is a position, not a picture.
        self.out = PlainConsole(width=width, soft_wrap=width is not None, emoji=False)
        self.err = _stderr(soft_wrap=not sys.stderr.isatty())
        send_notices(lambda line: self.notes([line]))

    def notes(self, lines: Sequence[str]) -> None:
        """One line each, dimmed, to stderr."""
        if not self.quiet:
            for line in lines:
                print_wrapped(self.err, f"[dim]note:[/dim] {escape(line)}")

    def say(self, line: str) -> None:
        """A dimmed line to stderr: what is being done now."""
        if not self.quiet:
            print_wrapped(self.err, f"[dim]{escape(line)}[/dim]")

    @contextmanager
    def doing(self, words: str) -> Iterator[None]:
        """A line in a terminal while something without steps is done; it leaves no trace."""
        if self.quiet or not self.err.is_terminal:
            yield
        else:
            with self.err.status(f"[dim]{escape(words)}[/dim]"):
                yield

    @contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None]]:
        """A bar in a terminal, a line every ten seconds in a log."""
        if self.quiet:
            yield lambda progress: None
        elif self.err.is_terminal:
            with progress_bar(self.err) as show:
                yield show
        else:
            yield ProgressLog(self.err)

    @contextmanager
    def uploading(self, bars: bool) -> Iterator[Callable[[Progress], None]]:
        """Lines of a log, unless huggingface_hub shows its bars."""
        yield (lambda progress: None) if bars or self.quiet else ProgressLog(self.err)

    @contextmanager
    def steps(self) -> Iterator[Callable[[Progress], None]]:
        """Progress of evaluations: a bar in a terminal, lines in a log."""
        from merge_cli.console.evaluations import StepLog, step_bar

        if self.quiet:
            yield lambda progress: None
        elif self.err.is_terminal:
            with step_bar(self.err) as show:
                yield show
        else:
            yield StepLog(self.err)

    def evaluations(self, models: Sequence[Mapping[str, Any]]) -> None:
        """A table of evaluations, by `evaluation.summary`."""
        from merge_cli.console.evaluations import print_evaluations

        if not self.quiet:
            print_evaluations(self.out, models)

    def comparison(self, record: Mapping[str, Any], shown: Path) -> None:
        """A comparison's table, and the paths of its files."""
        from merge_cli.console.evaluations import print_comparison

        if not self.quiet:
            print_comparison(self.out, record)
            for name in ("html", "md", "csv", "json"):
                self.out.print(f"  {escape(str(shown / f'comparison.{name}'))}", soft_wrap=True)

    def demo(self, demo: Demo, seconds: float) -> None:
        """The result of a demo: table, answers, files, and what to use."""
        from merge_cli.console.demo import print_demo

        if not self.quiet:
            print_demo(self.out, demo, seconds)

    def chat(
        self, models: Sequence[LiveModel], talks: Sequence[Conversation], sampling: Sampling
    ) -> None:
        """A conversation with models, until the user ends it."""
        from merge_cli.console.chat import ChatScreen

        ChatScreen(list(zip(models, talks, strict=True)), sampling, self.out, self.err).run()

    def answers(
        self, prompt: Prompt, labels: Sequence[str], row: Sequence[Answer], *, as_json: bool
    ) -> None:
        """One prompt of a file with the models' answers."""
        from merge_cli.console.chat import print_row

        print_row(self.out, prompt, labels, row, as_json=as_json)

    def plan(self, plan: Plan, options: MergeOptions, *, every: bool, as_json: bool) -> None:
        """The plan as a table (one row for each run of like layers) or as JSON.

        Training, search or calibration before the merge are shown, too; of a recipe with several
        documents all of them, in order.
        """
        if as_json:
            with self.doing("planning what comes before the merge"):
                document = plan_document(plan, options)
            print_json(indented(document))
            return
        for number, (name, variant) in enumerate(plan.variants.items(), start=1):
            of = f"Variant {number} of {len(plan.variants)}: {escape(name)}"
            self.out.print(f"[bold]{of}[/bold]")
            self._plan(variant, options, every=every)
            self.out.print()
        if plan.variants:
            read, written = show_size(plan.bytes_read), show_size(plan.bytes_written)
            self.out.print(f"[bold]All in one pass: {read} read, {written} written[/bold]")
            return
        for number, (name, stage) in enumerate(plan.stages.items(), start=1):
            self.out.print(f"[bold]Stage {number}: {escape(name)}[/bold]")
            self._plan(stage, options, every=every)
            self.out.print()
        if plan.stages:
            self.out.print(f"[bold]Result, after {len(plan.stages)} stages[/bold]")
        self._plan(plan, options, every=every)

    def _plan(self, plan: Plan, options: MergeOptions, *, every: bool) -> None:
        with self.doing("planning what comes before the merge"):
            expected = forecast(plan, options)
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.add_column("tensor" if every else "layers", overflow="fold")
        if not every:
            table.add_column("tensors", justify="right")
        table.add_column("parameters", justify="right")
        for name in ("dtype", "action"):
            table.add_column(name, overflow="fold")
        settings = Settings(plan.tasks)
        groups = settings.rows(plan.tasks, every)
        rows = [plan_row(label, tasks, settings) for label, tasks in groups]
        if every:
            rows = [(row[0], *row[2:]) for row in rows]  # each is one tensor
        if any(row[-1] for row in rows):
            table.add_column("with", overflow="fold")
        else:
            rows = [row[:-1] for row in rows]
        method = plan.recipe.merge_method
        on_base = plan.base is not None and plan.method.needs_base and not plan.recipe.output
        base = f" on {plan.sources[plan.base].label}" if on_base and plan.base is not None else ""
        sources = ", ".join(plan.sources[i].label for i in plan.operands)
        self.out.print(f"[bold]{escape(method)}[/bold] of {escape(sources + base)}")
        words = dict(settings.everywhere)
        for preparation, _ in expected.preparations:
            undecided = preparation.undecided(plan.recipe)
            words = dict(undecided) if "*" in undecided else {**words, **undecided}
        if words:
            everywhere = ", ".join(words.values())
            self.out.print(f"[dim]everywhere:[/dim] {escape(everywhere)}")
        self.out.print()
        print_table(self.out, table, rows)
        self.out.print()
        shards = len(plan.shards)
        self.out.print(
            f"{len(plan.tasks):,} tensors, {plan.parameter_count:,} parameters; "
            f"reads {show_size(plan.bytes_read)}, writes {show_size(plan.bytes_written)} "
            f"in {shards} file{'s' * (shards != 1)}; about {show_size(expected.peak)} of memory"
        )
        for label, (files, size) in plan.downloads.items():
            line = f"downloads {files} file{'s' * (files != 1)} of {label}, {show_size(size)}"
            print_wrapped(self.out, escape(line))
        for note in plan.notes:
            print_wrapped(self.out, f"[dim]note:[/dim] {escape(note)}")
        for preparation, decided in expected.preparations:
            preparation.print_plan(self.out, decided)

    def result(self, result: MergeResult, shown: Path, *, as_json: bool = False) -> None:
        """The result of a run."""
        if as_json:
            print_json(json.dumps(result.report, ensure_ascii=False))
            return
        if self.quiet or not result.report:
            return
        if result.made_before:
            self.out.print(
                f"[green]✓[/green] {escape(str(shown))} is this very merge already", soft_wrap=True
            )
            return
        if "adapter" in result.report:
            print_merged(self.out, result.report, shown)
            return
        for stage in result.report.get("stages", ()):
            sources = ", ".join(source["model"] for source in stage["inputs"])
            description = f"{stage['name']}: {stage['method']} of {sources}"
            self.out.print(f"  stage   {escape(description)}", soft_wrap=True)
        for preparation in preparations():
            preparation.print_result(self.out, result.report)
        if "sweep" in result.report:
            self._sweep(result.report, shown)
            return
        cost, output = result.report["cost"], result.report["output"]
        seconds = cost["seconds"] + cost["survey_seconds"]
        moved = cost["stages"]["read"]["bytes"] + cost["stages"]["write"]["bytes"]
        before = cost["resumed_bytes"]
        resumed = f" (after {show_size(before)} of an interrupted run)" if before else ""
        timed = moved >= _TIMED and seconds > 0.2
        rate = f" ({moved / seconds / 1e9:.1f} GB/s read and written)" if timed else ""
        self.out.print(
            f"[green]✓[/green] merged {output['parameters']:,} parameters into "
            f"{show_size(output['bytes'])} in {show_seconds(seconds)}{rate}{resumed}, "
            f"peak memory {show_size(cost['peak_rss'])}"
        )
        self.out.print(f"  model   {escape(str(shown))}", soft_wrap=True)
        self.out.print(f"  report  {escape(str(shown / 'merge_report.html'))}", soft_wrap=True)

    def _sweep(self, report: Mapping[str, Any], shown: Path) -> None:
        cost, variants = report["cost"], report["sweep"]
        size = show_size(cost["bytes_written"])
        self.out.print(
            f"[green]✓[/green] merged {len(variants)} variants, {size}, "
            f"in {show_seconds(cost['seconds'])} from {show_size(cost['bytes_read'])}, "
            f"peak memory {show_size(cost['peak_rss'])}"
        )
        for name in variants:
            self.out.print(f"  model   {escape(str(shown / name))}", soft_wrap=True)

    def analysis(
        self, analysis: Analysis, *, layers: bool, as_json: bool, recipe_hint: bool = True
    ) -> None:
        """An analysis as tables and sentences, or as JSON."""
        if as_json:
            print_json(indented(analysis.to_json()))
        else:
            print_analysis(self.out, analysis, layers=layers, recipe_hint=recipe_hint)

    def methods(self, methods: Sequence[Method], *, as_json: bool) -> None:
        """All methods, one row each."""
        if as_json:
            print_json(json.dumps([method_json(method) for method in methods], indent=1))
        else:
            print_methods(self.out, methods)

    def method(self, method: Method, *, as_json: bool) -> None:
        """One method: what it does, its parameters with defaults and ranges, an example."""
        if as_json:
            print_json(json.dumps(explained_json(method), indent=1))
        else:
            print_method(self.out, method)


def show_error(error: MergeCliError) -> None:
    """Print an error to stderr as plain text, so that it can be searched and copied."""
    # A terminal wraps between words. Paths stay in one piece, so that they can be copied.
    err = _stderr(soft_wrap=not sys.stderr.isatty())
    title = "Error" if type(error) is MergeCliError else f"{error.title} error"
    label = "" if error.exit_code == 130 else f"[bold red]{title}:[/bold red] "
    if isinstance(error, ProblemsError):
        print_wrapped(err, f"{label}{escape(error.summary)}")
        problems = (
            error.problems
            if len(error.problems) <= _MAX_PROBLEMS
            else error.problems[: _MAX_PROBLEMS // 2]
        )
        for problem in problems:
            print_wrapped(err, escape(str(problem)), indent=2)
        if len(problems) < len(error.problems):
            err.print(f"  ... and {len(error.problems) - len(problems)} more")
    else:
        print_wrapped(err, f"{label}{escape(str(error))}")


def _stderr(*, soft_wrap: bool) -> PlainConsole:
    return PlainConsole(stderr=True, soft_wrap=soft_wrap, highlight=False, emoji=False)
