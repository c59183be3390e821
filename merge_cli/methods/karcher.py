"""Karcher mean: the point on the sphere with the least squared distances to all models' directions.

Its length is the mean of theirs. Found by walking along the mean of the tangents until that is
shorter than `tol`; the walk stays in the span of the models, so that it is done with their
inner products alone. All models count alike, as in mergekit, unless `weighted` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import weighted_sum
from merge_cli.methods.blocks import TensorBlocks
from merge_cli.methods.inner_products import gram_matrix
from merge_cli.methods.method import Method
from merge_cli.methods.parameters import PerModel, Range, each
from merge_cli.methods.registry import merge_method, method_of
from merge_cli.recipe.schema import Parameters, Recipe
from merge_cli.recipe.values import scalars

_AtLeastZero = Annotated[float, Range(0.0)]


def mean_on_sphere(
    tensor: TensorBlocks,
    model: None,
    *,
    max_iter: int,
    tol: float,
    weight: Sequence[float] | None = None,
    **_: Any,
) -> list[float]:
    """What each model is multiplied with."""
    import numpy as np

    gram = gram_matrix(tensor)
    lengths = np.sqrt(np.diag(gram))
    weight = [1.0] * len(gram) if weight is None else weight
    shares = np.array(weight) / math.fsum(weight)
    if len(lengths) == 1:
        return [1.0]
    used = (lengths > tol) & (shares > 0)
    if not used.any():
        return [0.0] * len(lengths)
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=used)
    cosines = gram * inverse[:, None] * inverse[None, :]
    used_shares = np.where(used, shares, 0.0)
    used_shares /= used_shares.sum()
    result = _walk(used_shares, cosines, max_iter, tol)
    return list((float(shares @ lengths) * result * inverse).tolist())


def _walk(shares: Any, cosines: Any, max_iter: int, tol: float) -> Any:
    """The mean as coefficients of the unit vectors."""
    import numpy as np

    def length(c: Any) -> float:
        return math.sqrt(max(float(c @ cosines @ c), 0.0))

    mean = shares.copy()
    if length(mean) < tol:
        mean = np.zeros_like(shares)
        mean[int(np.argmax(shares > 0))] = 1.0
    else:
        mean /= length(mean)
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        # An opposite has no one direction towards it: left out, as what is already there is.
        pulls = (angles >= tol) & (np.sin(angles) > 0)
        grow = np.divide(angles, np.sin(angles), out=np.zeros_like(angles), where=pulls)
        tangent = shares * grow
        tangent = tangent - float(tangent @ dots) * mean
        size = length(tangent)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean /= length(mean)
    return mean


def _variant(recipe: Recipe) -> Method | None:
    given = recipe.parameters.get("weighted")
    read = method_of(karcher).parameters["weighted"].read
    asked = given is not None and any(read(value) is True for value in scalars(given.setting))
    return method_of(weighted_karcher) if asked else None


def _always(recipe: Recipe, shared: Sequence[Parameters]) -> bool:
    return True


@merge_method(
    "karcher",
    paper="arXiv:2603.04972",
    tensor_pass=mean_on_sphere,
    supports_numpy=True,
    resolve_variant=_variant,
    averages_base=_always,
)
def karcher(
    models: list[Array],
    prepared: list[float],
    *,
    weighted: bool = False,
    max_iter: Annotated[int, Range(0)] = 10,
    tol: Annotated[float, Range(0.0, above=True)] = 1e-5,
) -> Array:
    """Find the mean of the models' directions on the sphere, and give it the mean of their lengths.

    Args:
        weighted: let each model count by its `weight`; mergekit has none here and ignores it.
        max_iter: steps at most.
        tol: steps shorter than this end the search.
    """
    return weighted_sum(prepared, models)


@merge_method(
    "karcher",
    tensor_pass=mean_on_sphere,
    supports_numpy=True,
    listed=False,
)
def weighted_karcher(
    models: list[Array],
    prepared: list[float],
    *,
    weight: PerModel[_AtLeastZero] = each(1.0),
    weighted: bool = True,
    max_iter: Annotated[int, Range(0)] = 10,
    tol: Annotated[float, Range(0.0, above=True)] = 1e-5,
) -> Array:
    """Find the weighted mean of the models' directions, and give it the mean of their lengths.

    Args:
        weight: how much each model counts; divided by their sum.
        weighted: what asks for this formula.
        max_iter: steps at most.
        tol: steps shorter than this end the search.
    """
    return weighted_sum(prepared, models)
