"""Writes the four files that explain a merge into its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.outcome import MergeStats
from merge_cli.engine.plan import Plan
from merge_cli.recipe.dump import data_from, dump_recipe, path_from
from merge_cli.report.card import model_card
from merge_cli.report.coefficients import coefficient_summary
from merge_cli.report.gathered import calibration_summary
from merge_cli.report.html import render_html
from merge_cli.report.record import build_report
from merge_cli.report.stages import Stages


def write_reports(
    plan: Plan,
    fingerprints: tuple[str, ...],
    outcome: MergeStats,
    folder: Path,
    target: Path,
    training: Mapping[str, Any] | None = None,
    *,
    search: Mapping[str, Any] | None = None,
    attachments: Mapping[str, str] | None = None,
    stages: Mapping[str, Path] | None = None,
    card: bool = True,
) -> dict[str, Any]:
    """merge_recipe.yaml, merge_report.json, merge_report.html and README.md.

    Args:
        folder: where they are written.
        target: where the folder will be published: the recipe's paths lead from there.
        training: the record of how the coefficients were learned, if this run has learned them.
        search: the record of how parameters or members were found, if this run has found them.
        attachments: other files that belong to the merge, by name.
        stages: the folders of what other documents of the recipe have made for it, by name.
        card: whether to write README.md.

    Returns:
        the report.
    """
    made = Stages(stages or {})
    text, defaults = resolved_recipe(plan, fingerprints, target, made)
    report = build_report(plan, fingerprints, outcome, text)
    if plan.coefficients is not None:
        report["coefficients"] = coefficient_summary(plan)
    if plan.gathered is not None:
        report["gathered"] = calibration_summary(plan, plan.gathered)
    if training is not None:
        report["training"] = dict(training)
    if search is not None:
        report["search"] = dict(search)
    if made.names:
        report["stages"] = made.records()
    files = {
        **(attachments or {}),
        "merge_recipe.yaml": text,
        "merge_report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        "merge_report.html": render_html(report),
    }
    if card:
        files["README.md"] = model_card(plan, defaults, target.name, made)
    made.copy_coefficients(folder)
    if plan.coefficients is not None:
        try:
            shutil.copyfile(plan.coefficients.path, folder / FILE)
        except OSError as error:
            raise write_error(error, folder / FILE) from error
    for name, content in files.items():
        try:
            (folder / name).write_text(content, encoding="utf-8")
        except OSError as error:
            raise write_error(error, folder / name) from error
    return report


def resolved_recipe(
    plan: Plan, fingerprints: tuple[str, ...], target: Path, made: Stages | None = None
) -> tuple[str, dict[str, Any]]:
    """The recipe with everything that decides the bytes, and the method's defaults.

    Args:
        target: where it will lie: its paths lead from there.
        made: what other documents of the recipe have made.
    """
    made = made or Stages({})
    recipe = plan.recipe
    commits = {name: c for source in plan.sources for name, c in source.commits.items()}
    locate = made.named(path_from(target, recipe.folder, commits))
    labels = [source.label for source in plan.sources]
    digests = dict(zip(labels, fingerprints, strict=True))
    defaults = {
        name: parameter.default
        for name, parameter in plan.method.parameters.items()
        if parameter.default is not None
    }
    if recipe.base_model and plan.method.averages_base and plan.base not in plan.operands:
        defaults.pop("weight", None)  # written for all models, it would weigh the base, too
    inputs = {locate(model): digests[str(model)] for model in recipe.references}
    own = dump_recipe(
        recipe,
        locate=locate,
        defaults=defaults,
        inputs={name: digest for name, digest in inputs.items() if name not in made.names},
        coefficients=f"./{FILE}" if plan.coefficients is not None else None,
        data=data_from(target, recipe.folder) if plan.gathered is not None else None,
        kind=plan.method.gathers,
    )
    header = f"# resolved by merge-cli {version('merge-cli')}; running it gives the same bytes\n"
    return header + "---\n".join([*made.documents(target), own]), defaults
