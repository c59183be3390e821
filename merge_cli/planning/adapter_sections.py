"""A recipe whose output is an adapter: what it cannot have beside that."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.recipe.schema import Recipe

_OF_MODELS = (
    "slices",
    "modules",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "training",
    "statistics",
    "coefficients",
    "eval",
    "search",
    "objective",
)


def adapter_problems(recipe: Recipe, method: Method) -> Iterator[Problem]:
    """Sections that are about models, and methods that must run one."""
    if recipe.output is None:
        return
    for key in _OF_MODELS:
        if key in recipe.positions:
            yield recipe.problem(key, "has no meaning in a merge of adapters.", "Leave it out.")
    if not method.plain:
        message = f"{recipe.merge_method} runs models, and adapters are merged without one."
        yield recipe.problem("merge_method", message, "Use soup, task_arithmetic, ties, dare, ...")
