"""Evolutionary merging: a method's parameters, found by search. Akiba et al., arXiv:2403.13187.

What is searched ends as a static recipe of the inner method (`merge_cli.evolve`), so that the
formula here is always the inner method's.
"""

from __future__ import annotations

from merge_cli.errors import UsageError
from merge_cli.kernels.backend import Array
from merge_cli.methods.registry import Method, get_method, merge_method
from merge_cli.recipe.schema import Recipe


def _inner(recipe: Recipe) -> Method | None:
    """The method that is searched; the first, where one is to be chosen."""
    if recipe.search is None or not recipe.search.method:
        return None
    try:
        return get_method(recipe.search.method[0])
    except UsageError:
        return None  # said, with its place, where the section is checked


@merge_method("evolutionary", paper="arXiv:2403.13187", variant=_inner, searches=True)
def evolutionary(models: list[Array]) -> Array:
    """Search another method's parameters: by model, layer group and part of the names."""
    # What `merge-cli methods` shows. A plan carries the inner method (`variant`), and what is
    # merged is the static recipe that was found: nothing computes with this name.
    raise AssertionError("unreachable: a recipe that searches is resolved before it is merged")
