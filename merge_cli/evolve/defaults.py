"""Ranges of a search whose recipe names none: by method, from what merging needs.

Weights go from leaving a model out to taking all of it, and start at the soup, where they sum to 1.
Shares and scales, of which a factor matters and not a difference, are on a logarithmic scale.
"""

from __future__ import annotations

from dataclasses import replace

from merge_cli.recipe.search import Search, SearchedParameter

_WEIGHT = SearchedParameter("weight", 0.0, 1.0)
_DENSITY = SearchedParameter("density", 0.1, 1.0, log=True, tied=("models", "layers", "filters"))
_LAMBDA = SearchedParameter("lambda", 0.1, 2.0, log=True, tied=("layers", "filters"))
_SPARSE = (_WEIGHT, _DENSITY)
# Where weights are divided by their sum, lambda gives the size of the change.
_NORMALISED = (_WEIGHT, _DENSITY, _LAMBDA)
DEFAULT_RANGES: dict[str, tuple[SearchedParameter, ...]] = {
    "soup": (_WEIGHT,),
    "linear": (_WEIGHT,),
    "nuslerp": (_WEIGHT,),
    "multislerp": (_WEIGHT,),
    "task_arithmetic": (_WEIGHT,),
    "dare": _SPARSE,
    "dare_linear": _SPARSE,
    "dare_ties": _SPARSE,
    "breadcrumbs": _SPARSE,
    "breadcrumbs_ties": _SPARSE,
    "della_linear": _SPARSE,
    "della": _NORMALISED,
    "ties": _NORMALISED,
    "slerp": (SearchedParameter("t", 0.0, 1.0),),
    "sce": (SearchedParameter("select_topk", 0.05, 1.0, log=True),),
    "nearswap": (SearchedParameter("t", 1e-4, 1e-1, log=True),),
}


def with_default_ranges(search: Search) -> Search:
    """The search with the ranges of its methods, where it names none."""
    if search.parameters or not all(name in DEFAULT_RANGES for name in search.method):
        return search
    ranges: dict[str, SearchedParameter] = {}
    for method in search.method:
        for searched in DEFAULT_RANGES[method]:
            ranges.setdefault(searched.name, replace(searched, key=f"search.{searched.name}"))
    return replace(search, parameters=tuple(ranges.values()))
