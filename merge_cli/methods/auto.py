"""The automatic path: cheap merges first, then what needs data, and the best on validation rows.

Which method that is, and with which numbers, is found first (`merge_cli.auto`); what is merged is a
recipe of that method.
"""

from __future__ import annotations

from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.methods.stand_ins import automatic_method
from merge_cli.recipe.schema import Recipe


@automatic_method("auto")
def auto(recipe: Recipe) -> Method:
    """Try averages, merges that look at data, and learned coefficients; merge the best of them."""
    return get_method("soup" if recipe.base_model is None else "task_arithmetic")
