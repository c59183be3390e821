"""What has to happen before some merges: coefficients learned, parameters searched, data looked at.

    recipe ─▶ check ─▶ plan ─▶ run ─▶ Prepared: a plan that lacks nothing, and what to report

A plain method needs none of it. Of every preparation this is one shape: what comes out is a
resolved recipe plus files, and running that recipe again gives the same bytes. Each lives in a
folder of its own, with its checks, its panel and its report; nothing outside asks which one it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from merge_cli.methods.method import Method
from merge_cli.options import Progress
from merge_cli.system.libraries import require

if TYPE_CHECKING:
    from rich.console import Console

    from merge_cli.errors import Problem
    from merge_cli.options import MergeOptions, OnProgress
    from merge_cli.planning.plan import Plan
    from merge_cli.recipe.schema import Recipe

_FOLDERS = ("auto", "evolve", "dam", "calibration")  # in the order in which they check a recipe

Report = Mapping[str, Any]  # the content of merge_report.json


@dataclass(frozen=True)
class Prepared:
    """A plan that can be executed, and what the preparation leaves for the report.

    Attributes:
        plan: of the resolved recipe.
        record: sections of merge_report.json, by key.
        attachments: files that belong into OUT, by name.
        folders: that belong into OUT, by name: models, statistics. The plan reads them where
            they are.
        report: OUT's, where nothing is left to do in this process: a process that was killed has
            published it already, or (empty) another process of the same run publishes it.
        discard: throws the workspace away; called when OUT is published.
    """

    plan: Plan
    record: Mapping[str, Any] = field(default_factory=dict)
    attachments: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    report: Report | None = None
    discard: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        """Bytes of the folders, which OUT gets copies of."""
        files = (path for folder in self.folders.values() for path in folder.rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())


class Preparation(Protocol):
    """One kind of preparation.

    Attributes:
        name: of the kind, as methods name it (`Method.preparation`).
        does: what a method that needs it does, in words after its name.
        section: its key in a plan's JSON.
        parameter_hint: said of parameters that such a method does not take; empty where it takes,
            or passes by, the same ones as plain methods.
        finds_method: what it prepares includes the method that merges: as long as its own section
            is wrong, nothing else about the recipe can be checked.
    """

    @property
    def name(self) -> str: ...

    @property
    def does(self) -> str: ...

    @property
    def section(self) -> str: ...

    @property
    def finds_method(self) -> bool: ...

    @property
    def parameter_hint(self) -> str: ...

    def check(self, recipe: Recipe, method: Method) -> Iterator[Problem]:
        """What the recipe lacks, may not have beside this, or has for a method without this."""

    def warnings(self, recipe: Recipe, method: Method) -> Iterator[str]:
        """What has no effect, a line each."""

    def applies(self, plan: Plan) -> bool:
        """Whether the plan lacks what this makes."""

    def plan(self, plan: Plan, options: MergeOptions) -> Any | None:
        """Decide it from headers, configs, tokenizers and data files, without any weight.

        Returns:
            what the functions that show it take; None where a source is still to be made by
            another document of the recipe: then data alone is checked.

        Raises:
            RecipeError, SourceError, MismatchError, ResourceError: everything that can be wrong.
        """

    def run(
        self,
        plan: Plan,
        target: Path,
        options: MergeOptions,
        on_progress: OnProgress,
        *,
        require_improvement: bool = False,
    ) -> Prepared:
        """Do it; continue where a run was killed. Everything is checked before it is fetched.

        Args:
            target: OUT; work happens beside it.
            require_improvement: refuse a result that is no better than merges without this.

        Raises:
            as `plan` does; Interrupted, NonFiniteError, GateError: the same call continues.
        """

    def identity(self, plan: Plan, device: str) -> bytes:
        """What else the result depends on, beside what `engine.journal.work_key` knows."""

    def contents_used(self, recipe: Recipe) -> set[bytes]:
        """What rows say (`evaluation.rows.content_of`) that the result is made or chosen by."""

    def plan_json(self, decided: Any) -> dict[str, Any]:
        """What `plan` has decided, as data, for `--json`."""

    def print_plan(self, out: Console, decided: Any) -> None:
        """The same as text."""

    def undecided(self, recipe: Recipe) -> Mapping[str, str]:
        """Parameters whose values it finds, and where they may lie; `*` stands for all of them."""

    def options_json(self, method: Method) -> dict[str, Any]:
        """The keys of its section that a method takes, as data, for `methods NAME --json`."""

    def print_options(self, out: Console, method: Method) -> None:
        """The same as text."""

    def print_result(self, out: Console, report: Report) -> None:
        """What it brought, after a merge; nothing where the report does not speak of it."""

    def summary(self, plan: Plan) -> dict[str, Any]:
        """Sections of merge_report.json on files that the plan merges with; none: empty."""

    def conclusion(self, report: Report) -> str:
        """What it brought, in one sentence for the top of the page; empty where it says nothing."""

    def report_sections(self, report: Report) -> Sequence[Any]:
        """The sections of the report's page (`report.page.Section`); none: empty."""


@cache
def preparations() -> tuple[Preparation, ...]:
    """Every kind that there is."""
    return tuple(import_module(f"merge_cli.{name}.preparation").PREPARATION for name in _FOLDERS)


def preparations_of(plan: Plan) -> list[Preparation]:
    """What must happen before a plan can be executed: at most one; empty for most."""
    return [preparation for preparation in preparations() if preparation.applies(plan)]


def prepare(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    on_progress: OnProgress,
    *,
    require_improvement: bool = False,
) -> Prepared:
    """Do what must happen before a plan can be executed: nothing, or one preparation.

    Raises:
        ResourceError: it runs models, and torch or transformers cannot be imported.
        Others as `Preparation.run` does.
    """
    for preparation in preparations_of(plan):
        # Seconds, in which nothing else would be said; one process of torchrun speaks for all.
        if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
            on_progress(Progress("prepare", 0, 0, "loading torch and transformers"))
        for library in ("torch", "transformers"):
            require(library, plan.recipe.merge_method)
        return preparation.run(
            plan, target, options, on_progress, require_improvement=require_improvement
        )
    return Prepared(plan)


def preparation_for(method: Method) -> Preparation | None:
    """The kind that a method needs; None for a plain one."""
    return next((item for item in preparations() if item.name == method.preparation), None)
