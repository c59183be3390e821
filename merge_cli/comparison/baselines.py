"""The merges that every comparison contains: what there is to beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SOUP = "uniform soup"
TASK_ARITHMETIC = "task arithmetic 0.4"
# The TIES paper's choice for it where there is no data to choose by (arXiv:2306.01708, section 6).
_LAMBDA = 0.4


def baseline_recipes(
    base: Path | str | None, sources: Sequence[Path | str], dtype: str | None
) -> dict[str, str]:
    """Recipes by name: the uniform soup, and task arithmetic where there is a base.

    Args:
        base, sources: folders or Hub ids.
        dtype: of the output; None keeps each tensor's own.
    """
    models = [{"model": str(source)} for source in sources]
    shared = {"dtype": dtype} if dtype else {}
    recipes: dict[str, dict[str, Any]] = {
        SOUP: {"merge_method": "soup", "models": models, **shared}
    }
    if base is not None:
        recipes[SOUP]["base_model"] = str(base)  # whose config and tokenizer it takes, as others do
        recipes[TASK_ARITHMETIC] = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": models,
            "parameters": {"lambda": _LAMBDA},
            **shared,
        }
    return {
        name: f"# {name}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}"
        for name, recipe in recipes.items()
    }
