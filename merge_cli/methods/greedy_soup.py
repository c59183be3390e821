"""Greedy soup: average the models that make the average better. Wortsman et al., arXiv:2203.05482.

Which those are is found first (`merge_cli.evolve.greedy`); what is merged is a plain soup of them.
"""

from __future__ import annotations

from merge_cli.kernels.backend import Array
from merge_cli.methods.registry import Method, get_method, merge_method
from merge_cli.recipe.schema import Recipe


def _soup(recipe: Recipe) -> Method | None:
    return get_method("soup")


@merge_method("greedy_soup", paper="arXiv:2203.05482", variant=_soup, searches=True)
def greedy_soup(models: list[Array]) -> Array:
    """Average the models, the best first, that make the average better on held-out data."""
    # What `merge-cli methods` shows. A plan carries `soup` (`variant`), and what is merged is the
    # soup of the members that were found: nothing computes with this name.
    raise AssertionError("unreachable: a recipe that searches is resolved before it is merged")
