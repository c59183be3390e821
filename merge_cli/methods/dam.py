"""DAM: merging with learned coefficients. Gauthier-Caron et al., arXiv:2410.08371.

The coefficients come from a file that training has left (`merge_cli.dam`); here they are applied,
like any other weights. What is learned may start from nothing (soup) or from the base (task
vectors): two formulas, of which the file says which one it is for.
"""

from __future__ import annotations

from merge_cli.checkpoint.coefficients import TensorCoefficients, open_coefficients
from merge_cli.errors import CorruptFileError
from merge_cli.kernels.backend import Array
from merge_cli.methods.blocks import Span
from merge_cli.methods.method import Method
from merge_cli.methods.registry import merge_method, method_of
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe


def _scaled_sum(arrays: list[Array], at: Span, coefficients: TensorCoefficients) -> Array:
    """Sum of c * x in the order of the recipe, each product and each sum rounded by itself."""
    total: Array = None
    for source, array in enumerate(arrays):
        c = coefficients.span(source, at.start, len(array), array)
        term = array * c
        if total is None:
            total = term
        else:
            total += term
    return total


def _form(recipe: Recipe) -> str:
    """What the coefficients are for; the file's own word counts, if there is one."""
    if recipe.coefficients:
        path = local_file(recipe.coefficients, recipe.folder)
        try:
            return open_coefficients(path).form if path else "soup"
        except CorruptFileError:
            return "soup"  # said where the plan opens it
    return recipe.learning.form


def _variant(recipe: Recipe) -> Method | None:
    return method_of(dam_task_vector) if _form(recipe) == "task_vector" else None


@merge_method(
    "dam",
    paper="arXiv:2410.08371",
    resolve_variant=_variant,
    supports_numpy=True,
)
def dam(models: list[Array], at: Span, coefficients: TensorCoefficients) -> Array:
    """Sum of c_i * W_i with learned coefficients, by default one for each input column."""
    return _scaled_sum(models, at, coefficients)


@merge_method("dam", paper="arXiv:2410.08371", supports_numpy=True, listed=False)
def dam_task_vector(
    base: Array, deltas: list[Array], at: Span, coefficients: TensorCoefficients
) -> Array:
    """The base plus the sum of c_i * (W_i - base) with learned coefficients."""
    return base + _scaled_sum(deltas, at, coefficients)
