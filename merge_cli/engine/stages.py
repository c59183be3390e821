"""A recipe of several documents: each is made where the next ones find it, OUT last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.engine.device import device_of
from merge_cli.engine.journal import work_key
from merge_cli.engine.made_before import made_before, request_key
from merge_cli.engine.merge import check_target
from merge_cli.engine.output import OutputWorkspace
from merge_cli.engine.stage_folder import StageWorkspace
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.planning.stages import needed, over_results, unused

# Makes one document, given the folders of what other documents have made for it, and the key of
# what is asked for: its report.
MakeDocument = Callable[[Plan, Path, MergeOptions, Mapping[str, Path], str], dict[str, Any]]


def make_stages(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    on_progress: OnProgress,
    make_document: MakeDocument,
) -> dict[str, Any]:
    """Make every document that is not there yet.

    Returns:
        the report of the last one, which is OUT's.

    Raises:
        as `make_document` does; what is wrong with any of the documents before the first is made.
    """
    kind, stages = device_of(options).kind, plan.stages
    keys = {name: work_key(stage, kind, options.statistics) for name, stage in stages.items()}
    results = unused(plan)
    with StageWorkspace(target) as workspace:
        if options.fresh:
            workspace.clear()
        todo = [name for name in stages if not workspace.has(name, keys[name])]
        resumed = workspace.begun and not options.fresh
        report = made_before(plan, target, options) if resumed else None
        if report is None:
            check_target(plan, target, options)
            sizes = [stages[name].bytes_written for name in todo]
            OutputWorkspace(target).check_space(sum(sizes) + plan.bytes_written)
            for document in (*(stages[name] for name in todo), plan):
                for preparation in preparations_of(document):
                    preparation.plan(document, options)
        folders = {name: workspace.path_of(name) for name in stages}

        def make(document: Plan, out: Path, options: MergeOptions) -> dict[str, Any]:
            made = {name: folders[name] for name in needed(document)}
            request = request_key(document, options)
            return make_document(over_results(document, folders), out, options, made, request)

        for number, (name, stage) in enumerate(stages.items(), start=1):
            is_made = name not in todo
            note = f"stage {number} of {len(stages)}: {name}{': made before' * is_made}"
            on_progress(Progress("stage", 0, 0, note))
            if not is_made and (report is None or name in results):
                workspace.begin(name, keys[name])
                if made_before(stage, folders[name], options) is None:
                    make(stage, folders[name], replace(options, overwrite=True))
                workspace.finished(name, keys[name])
        report = report or make(plan, target, options)
        workspace.tidy(stages if options.keep_stages else results)
    return report
