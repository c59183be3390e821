"""Writes the four files that explain a merge into its folder.

merge_report.json: what was merged, with what, how the sources relate, what it cost.

The schema is documented in docs/report.md; `schema` grows by one when a field changes meaning.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.engine.memory import peak_rss
from merge_cli.engine.merge_stats import MergeStats, StageTime, TensorStats
from merge_cli.planning.layers import layer_key_of
from merge_cli.planning.plan import Plan
from merge_cli.planning.preparation import preparations
from merge_cli.recipe.dump import data_from, dump_recipe, path_from
from merge_cli.recipe.reference import short_labels
from merge_cli.report.card import model_card
from merge_cli.report.html import render_html
from merge_cli.report.stages import Stages
from merge_cli.system.libraries import library_version
from merge_cli.system.raw_io import write_error


def write_reports(
    plan: Plan,
    fingerprints: tuple[str, ...],
    outcome: MergeStats,
    folder: Path,
    target: Path,
    *,
    record: Mapping[str, Any] | None = None,
    attachments: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
    stages: Mapping[str, Path] | None = None,
    card: bool = True,
) -> dict[str, Any]:
    """merge_recipe.yaml, merge_report.json, merge_report.html and README.md.

    Args:
        folder: where they are written.
        target: where the folder will be published: the recipe's paths lead from there.
        record: sections on what this run has prepared, if anything (`Prepared.record`).
        attachments: other files that belong to the merge, by name.
        folders: that belong to it, by name (`Prepared.folders`): copied.
        stages: the folders of what other documents of the recipe have made for it, by name.
        card: whether to write README.md.

    Returns:
        the report.
    """
    made = Stages(stages or {}, folders or {})
    text, defaults = resolved_recipe(plan, fingerprints, target, made)
    report = build_report(plan, fingerprints, outcome, text)
    for item in report["inputs"]:
        item["model"] = made.kept_name(item["model"])
    for preparation in preparations():
        report.update(preparation.summary(plan))
    report.update(record or {})
    if made.names:
        report["stages"] = made.records()
        report = made.by_name(report)
        attachments = {
            name: made.complete(content, target) if ".yaml" in name else made.by_name(content)
            for name, content in (attachments or {}).items()
        }
    files = {
        **(attachments or {}),
        "merge_recipe.yaml": text,
        "merge_report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        "merge_report.html": render_html(report),
    }
    if card:
        files["README.md"] = model_card(plan, defaults, target.name, made)
    made.copy_files(folder)
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
    fingerprints_by_label = dict(zip(labels, fingerprints, strict=True))
    defaults = {
        name: parameter.default
        for name, parameter in plan.method.parameters.items()
        if parameter.default is not None
    }
    if recipe.base_model and plan.method.averages_base and plan.base not in plan.operands:
        defaults.pop("weight", None)  # written for all models, it would weigh the base, too
    inputs = {locate(model): fingerprints_by_label[str(model)] for model in recipe.references}
    folder = recipe.statistics_folder
    needs_data = plan.calibrated is not None and folder is None
    document = dump_recipe(
        recipe,
        locate=locate,
        defaults=defaults,
        inputs={name: digest for name, digest in inputs.items() if name not in made.names},
        coefficients=f"./{FILE}" if plan.coefficients is not None else None,
        statistics=made.kept_folder(folder, recipe.folder, target) if folder else None,
        data=data_from(target, recipe.folder) if needs_data else None,
        kind=plan.method.gathers,
    )
    header = f"# resolved by merge-cli {version('merge-cli')}; running it gives the same bytes\n"
    return header + "---\n".join([*made.documents(target), document]), defaults


SCHEMA = 1


def build_report(
    plan: Plan, fingerprints: Sequence[str], outcome: MergeStats, recipe_text: str
) -> dict[str, Any]:
    """The report as JSON-ready data; `recipe_text` is the resolved recipe."""
    used = sorted({*plan.operands, *([plan.base] if plan.base is not None else [])})
    return {
        "schema": SCHEMA,
        "work": outcome.key,
        "merge_cli": version("merge-cli"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": library_version("torch"),
            "numpy": version("numpy"),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "device": {
            "type": outcome.device.kind,
            "arithmetic": outcome.arithmetic,
            "name": outcome.device.name,
            "reason": outcome.device.reason,
        },
        "threads": outcome.threads,
        "recipe": {
            "method": plan.recipe.merge_method,
            "file": plan.recipe.file.rpartition("/")[2],
            "digest": hashlib.sha256(recipe_text.encode()).hexdigest(),
            "seed": plan.recipe.seed,
            "text": recipe_text,
        },
        "inputs": [
            {
                "role": "base" if i == plan.base else "source",
                "model": plan.sources[i].label,
                "revision": plan.sources[i].revision,
                "digest": fingerprints[i],
                "tensors": len(plan.sources[i].tensors),
                "bytes": sum(ref.nbytes for ref in plan.sources[i].tensors.values()),
            }
            for i in used
        ],
        "output": {
            "bytes": plan.bytes_written,
            "parameters": plan.parameter_count,
            "shards": [{"file": shard.file, "bytes": shard.size} for shard in plan.shards],
            "dtypes": dict(Counter(task.dtype for task in plan.tasks)),
        },
        "notes": list(plan.notes),
        "statistics": _statistics(plan, outcome.stats),
        "tensors": [
            {
                "name": task.name,
                "shape": list(task.shape),
                "dtype": task.dtype,
                "action": task.action,
                "note": task.note,
                "norm": [_rounded(norm) for norm in _norms(stats)] or None,
                "non_finite": sum(stats.non_finite),
            }
            for task, stats in zip(plan.tasks, outcome.stats, strict=True)
        ],
        "cost": {
            "seconds": round(outcome.seconds, 3),
            "survey_seconds": round(outcome.survey_seconds, 3),
            "stages": {name: _stage(stage) for name, stage in outcome.stages.items()},
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "resumed_bytes": outcome.resumed,
            "peak_rss": peak_rss(),
            "peak_vram": _peak_vram(outcome),
            "buffers": outcome.buffers,
            **({"nodes": [vars(node) for node in outcome.nodes]} if outcome.nodes else {}),
        },
    }


def _stage(stage: StageTime) -> dict[str, Any]:
    """What a stage did in this run; GB/s while its threads were busy."""
    busy = stage.seconds / stage.threads
    rate = round(stage.bytes / busy / 1e9, 3) if busy and stage.bytes else None
    return {
        "thread_seconds": round(stage.seconds, 4),
        "threads": stage.threads,
        "bytes": stage.bytes,
        "gigabytes_per_second": rate,
    }


def _peak_vram(outcome: MergeStats) -> int | None:
    """The most that one device here held; None on a CPU, and of a cluster's devices."""
    if not outcome.device.indexes:
        return None
    import torch

    return max(torch.cuda.max_memory_allocated(i) for i in outcome.device.indexes)


def _statistics(plan: Plan, stats: Sequence[TensorStats]) -> dict[str, Any] | None:
    """Sums by group and in total. Slices that merge different sources cannot be added up."""
    measured = [(t, s) for t, s in zip(plan.tasks, stats, strict=True) if s.gram]
    if not measured or len({task.ids for task, _ in measured}) > 1:
        return None
    groups: dict[str, TensorStats] = {}
    total, sampled = TensorStats(), 0
    for task, item in measured:
        sampled += item.sampled
        groups.setdefault(task.group, TensorStats()).add(item.estimate)
        total.add(item.estimate)
    labels = short_labels([plan.sources[i].label for i in measured[0][0].sources])
    return {
        "of": "deltas" if "deltas" in plan.method.supplied else "weights",
        "models": labels,
        "sampled": round(sampled / total.count, 4) if total.count else 1.0,
        "total": _group("whole model", total),
        "groups": [_group(name, stats) for name, stats in groups.items()],
    }


def _group(name: str, stats: TensorStats) -> dict[str, Any]:
    norms = _norms(stats)
    base = math.sqrt(stats.base)
    layer = layer_key_of(f"{name}.x")
    has_pairs = len(norms) > 1 and any(stats.gram[0][1:])
    pairs = range(len(norms)) if has_pairs else ()
    cosine = [
        [_ratio(stats.gram[i][j], norms[i] * norms[j]) if i != j else 1.0 for j in pairs]
        for i in pairs
    ]
    agreement = [
        [_ratio(a, b) for a, b in zip(row, both, strict=True)]
        for row, both in zip(stats.agree, stats.both, strict=True)
    ]
    return {
        "name": name,
        "layer": layer.number if layer else None,
        "count": stats.count,
        "norm": [_rounded(norm) for norm in norms],
        "relative_norm": [_ratio(norm, base) for norm in norms] if base else None,
        "cosine": cosine if has_pairs else None,
        "sign_agreement": agreement or None,
        "conflict": _ratio(stats.conflict, stats.sampled) if agreement else None,
        "kept": [_ratio(kept, stats.sampled) for kept in stats.kept] or None,
        "change": _ratio(math.sqrt(stats.change), base),
    }


def _norms(stats: TensorStats) -> list[float]:
    squares = [row[min(i, len(row) - 1)] for i, row in enumerate(stats.gram)]
    return [math.sqrt(max(square, 0.0)) for square in squares]


def _ratio(part: float, total: float) -> float | None:
    return _rounded(part / total) if total else None


def _rounded(value: float) -> float | None:
    """Six digits, which is what float32 sums can hold; None where weights were not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
