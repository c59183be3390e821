"""Evolutionary merging: a method's parameters, found by search. Akiba et al., arXiv:2403.13187.

What is searched ends as a static recipe of the inner method (`merge_cli.evolve`), so that the
formula here is always the inner method's.
"""

from __future__ import annotations

from merge_cli.errors import UsageError
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.methods.stand_ins import searched_method
from merge_cli.recipe.schema import Recipe


@searched_method("evolutionary", paper="arXiv:2403.13187")
def evolutionary(recipe: Recipe) -> Method | None:
    """Search another method's parameters: by model, layer group and part of the names."""
    if recipe.search is None or not recipe.search.method or recipe.search.layers:
        return None  # layers are stacked from any number of models
    try:
        return get_method(recipe.search.method[0])  # the first, where one is to be chosen
    except UsageError:
        return None  # reported where the section is checked, with its line and column
