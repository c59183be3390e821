"""merge-cli: merges language-model checkpoints, from averaging to automatic methods.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_cli.adapters.extract import extract_lora
    from merge_cli.analysis.run import analyze
    from merge_cli.api import merge, plan
    from merge_cli.averages import add_checkpoints
    from merge_cli.comparison.publish import compare
    from merge_cli.documents import MergeResult
    from merge_cli.engine.running_average import RunningAverage
    from merge_cli.engine.state_dicts import merge_state_dicts
    from merge_cli.errors import MergeCliError
    from merge_cli.evaluation.run import evaluate
    from merge_cli.methods.registry import merge_method
    from merge_cli.options import MergeOptions
    from merge_cli.planning.planner import load_recipe
    from merge_cli.publishing.push import push
    from merge_cli.recipe.schedule import checkpoint_weights

_HOMES = {
    "MergeCliError": "merge_cli.errors",
    "MergeOptions": "merge_cli.options",
    "MergeResult": "merge_cli.documents",
    "RunningAverage": "merge_cli.engine.running_average",
    "add_checkpoints": "merge_cli.averages",
    "analyze": "merge_cli.analysis.run",
    "checkpoint_weights": "merge_cli.recipe.schedule",
    "compare": "merge_cli.comparison.publish",
    "evaluate": "merge_cli.evaluation.run",
    "extract_lora": "merge_cli.adapters.extract",
    "load_recipe": "merge_cli.planning.planner",
    "merge": "merge_cli.api",
    "merge_method": "merge_cli.methods.registry",
    "merge_state_dicts": "merge_cli.engine.state_dicts",
    "plan": "merge_cli.api",
    "push": "merge_cli.publishing.push",
}

__all__ = [
    "MergeCliError",
    "MergeOptions",
    "MergeResult",
    "RunningAverage",
    "add_checkpoints",
    "analyze",
    "checkpoint_weights",
    "compare",
    "evaluate",
    "extract_lora",
    "load_recipe",
    "merge",
    "merge_method",
    "merge_state_dicts",
    "plan",
    "push",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'merge_cli' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names, and those that every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
