"""merge_report.json: what was merged, with what, how the sources relate, what it cost.

The schema is documented in docs/report.md; `schema` grows by one when a field changes meaning.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from merge_cli.engine.layers import layer_key_of
from merge_cli.engine.memory import peak_rss
from merge_cli.engine.outcome import MergeStats, StageTime
from merge_cli.engine.plan import Plan
from merge_cli.engine.statistics import TensorStats
from merge_cli.recipe.reference import short_labels

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
            "torch": version("torch"),
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
    """The most that one device held; None on a CPU."""
    if outcome.device.kind == "cpu":
        return None
    import torch

    return max(torch.cuda.max_memory_allocated(i) for i in outcome.device.indexes)


def _statistics(plan: Plan, stats: Sequence[TensorStats]) -> dict[str, Any] | None:
    """Sums by group and in total. Slices that merge different sources cannot be added up."""
    measured = [(t, s) for t, s in zip(plan.tasks, stats, strict=True) if s.gram]
    if not measured or len({task.ids for task, _ in measured}) > 1:
        return None
    groups: dict[str, TensorStats] = {}
    total = TensorStats()
    for task, one in measured:
        groups.setdefault(task.group, TensorStats()).add(one)
        total.add(one)
    labels = short_labels([plan.sources[i].label for i in measured[0][0].sources])
    return {
        "of": "deltas" if "deltas" in plan.method.supplied else "weights",
        "models": labels,
        "sampled": round(total.sampled / total.count, 4) if total.count else 1.0,
        "total": _group("whole model", total),
        "groups": [_group(name, one) for name, one in groups.items()],
    }


def _group(name: str, stats: TensorStats) -> dict[str, Any]:
    norms = _norms(stats)
    base = math.sqrt(stats.base)
    place = layer_key_of(f"{name}.x")
    pairs = range(len(norms))
    has_pairs = len(norms) > 1 and any(stats.gram[0][1:])
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
        "layer": place.index if place else None,
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
    return [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(stats.gram)]


def _ratio(part: float, whole: float) -> float | None:
    return _rounded(part / whole) if whole else None


def _rounded(value: float) -> float | None:
    """Six digits, which is what float32 sums can hold; None where weights were not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
