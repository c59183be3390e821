"""Greedy soup: average the models that make the average better. Wortsman et al., arXiv:2203.05482.

Which those are is found first (`merge_cli.evolve.greedy`); what is merged is a plain soup of them.
"""

from __future__ import annotations

from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.methods.stand_ins import searched_method
from merge_cli.recipe.schema import Recipe


@searched_method("greedy_soup", paper="arXiv:2203.05482")
def greedy_soup(recipe: Recipe) -> Method:
    """Average the models, the best first, that make the average better on held-out data."""
    return get_method("soup")
