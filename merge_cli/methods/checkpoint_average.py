"""Averages of a training run's checkpoints in the place of a learning-rate decay. arXiv:2507.17634.

Which checkpoints, and with which weights, is read from the recipe (`recipe.checkpoints`, and
`recipe.schedule` for the formulas); what is merged is a plain soup of them.
"""

from __future__ import annotations

from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.methods.stand_ins import short_form
from merge_cli.recipe.checkpoints import BECOMES, METHOD
from merge_cli.recipe.schema import Recipe


@short_form(METHOD, paper="arXiv:2507.17634")
def checkpoint_average(recipe: Recipe) -> Method:
    """Average checkpoints of one training run as if its learning rate had decayed."""
    return get_method(BECOMES)
