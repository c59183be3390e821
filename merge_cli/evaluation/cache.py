"""The cache of evaluation results: the same model on the same task is evaluated once.

A file for each pair, named by the fingerprint of what decides the result. The folder is
$MERGE_CLI_CACHE, or merge-cli in $XDG_CACHE_HOME or ~/.cache; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge_cli.evaluation.result import Cost, Metric, TaskResult
from merge_cli.system.caches import cache_folder, write_cached
from merge_cli.system.notices import say_once
from merge_cli.system.records import read_sealed, seal

_FORMAT = 2


def key_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides a result."""
    text = json.dumps({"format": _FORMAT, **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def find(key: str, name: str) -> TaskResult | None:
    """A result from an earlier run, under the name that its task has now; None if there is none."""
    content = read_sealed(_path(key))
    if content is None:
        return None  # absent, unreadable or damaged: evaluated and written again
    try:
        metrics = {name: Metric(**metric) for name, metric in content["metrics"].items()}
        cost = Cost(**content["cost"])
        notes = tuple(content["notes"])
        return TaskResult(
            name, content["kind"], metrics, content["examples"], cost, cached=True, notes=notes
        )
    except (KeyError, TypeError, AttributeError):
        return None  # written by another version


def keep(key: str, result: TaskResult) -> None:
    """Write a result to the cache; a cache that cannot be written only costs time later."""
    content = {
        "kind": result.kind,
        "metrics": {name: asdict(metric) for name, metric in result.metrics.items()},
        "examples": list(result.examples),
        "cost": asdict(result.cost),
        "notes": list(result.notes),
    }
    if not write_cached(_path(key), seal(content)):
        say_once(
            f"results are not kept, because {cache_folder()} cannot be written. "
            "Set MERGE_CLI_CACHE to a folder that can."
        )


def _path(key: str) -> Path:
    return cache_folder() / "evaluations" / key[:2] / f"{key}.json"
