"""What takes part in a comparison: unique short names, and the baseline recipes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from merge_cli.sources.source import Source

SOUP = "uniform soup"
TASK_ARITHMETIC = "task arithmetic 0.4"
# The TIES paper's lambda for task arithmetic without validation data (arXiv:2306.01708, section 6).
_LAMBDA = 0.4


class EntryNames:
    """Gives unique names. `base` and the names of baselines are reserved.

    Args:
        base, sources: named by the last part of their labels, or by more to make it unique.

    Attributes:
        of: a source's resolved folder -> its name.
    """

    def __init__(self, base: Source | None, sources: Sequence[Source]) -> None:
        self._taken = {SOUP, TASK_ARITHMETIC}
        self.of: dict[Path, str] = {}
        if base is not None:
            self.of[base.root.resolve()] = self._new(_forms(base))
        self._taken.add("base")
        for source in sources:
            self.of[source.root.resolve()] = self._new(_forms(source))

    def of_recipe(self, file: Path, recipe_name: str | None) -> str:
        """The name in a recipe, or its file's, with as much of the path as makes it unique."""
        stem = file.with_suffix("")
        forms = [recipe_name] if recipe_name else []
        return self._new([*forms, stem.name, "/".join(stem.parts[-2:]), str(stem), str(file)])

    def of_variant(self, file: Path, variant: str) -> str:
        """The name of a sweep's variant, with its recipe's where another model has it."""
        return self._new([variant, f"{file.stem}/{variant}", f"{file.with_suffix('')}/{variant}"])

    def _new(self, forms: Sequence[str]) -> str:
        counted = (f"{forms[0]} ({number})" for number in range(2, len(self._taken) + 3))
        name = next(form for form in chain(forms, counted) if form not in self._taken)
        self._taken.add(name)
        return name


def _forms(source: Source) -> list[str]:
    return [source.label.rstrip("/").rpartition("/")[2], source.label, str(source.root)]


def baseline_recipes(
    base: Path | str | None, sources: Sequence[Path | str], dtype: str | None
) -> dict[str, str]:
    """Recipes by name: the uniform soup, and task arithmetic where there is a base.

    Args:
        base, sources: folders or Hub ids.
        dtype: of the output; None keeps each tensor's dtype.
    """
    models = [{"model": str(source)} for source in sources]
    shared = {"dtype": dtype} if dtype else {}
    recipes: dict[str, dict[str, Any]] = {
        SOUP: {"merge_method": "soup", "models": models, **shared}
    }
    if base is not None:
        recipes[SOUP]["base_model"] = str(base)  # provides config and tokenizer, as in other merges
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
