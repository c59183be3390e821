"""Fisher merging: means weighted by importance. Matena and Raffel, arXiv:2111.09832.

Each model is a Gaussian around its weights whose precision is the diagonal of its Fisher
information F_i: the mean over examples of the squared gradient of the log-likelihood. Their product
has its maximum at

    theta = sum of w_i F_i theta_i / sum of w_i F_i

The importances are calibrated beforehand (`merge_cli.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from merge_cli.checkpoint.statistics import TensorStatistics
from merge_cli.kernels.backend import Array
from merge_cli.methods.blocks import Span
from merge_cli.methods.consensus import no_average, weighted_mean
from merge_cli.methods.parameters import PerModel, Range, each
from merge_cli.methods.registry import merge_method

Normalize = Literal["l2", "sum", "none"]


def importance_scales(models: Sequence[Mapping[str, Any]], normalize: Normalize) -> list[float]:
    """What each model's importances are multiplied by, so that their usual size is about 1.

    Args:
        models: `elements` of each, with the `sum` of their importances and of their `squares`.
    """
    if normalize == "none":  # one factor for all: it cancels, but for epsilon
        usual = math.fsum(model["sum"] / model["elements"] for model in models) / len(models)
        return [1 / usual if usual else 0.0] * len(models)
    sizes = [
        math.sqrt(item["squares"] / item["elements"])
        if normalize == "l2"
        else item["sum"] / item["elements"]
        for item in models
    ]
    return [1 / size if size else 0.0 for size in sizes]


@merge_method(
    "fisher", paper="arXiv:2111.09832", check=no_average, supports_numpy=True, gathers="fisher"
)
def fisher(
    models: list[Array],
    at: Span,
    statistics: TensorStatistics,
    *,
    weight: PerModel[Annotated[float, Range(0.0)]] = each(1.0),
    normalize: Normalize = "l2",
    epsilon: Annotated[float, Range(0.0, above=True)] = 1e-6,
) -> Array:
    """Average elements, weighted by how much each source's loss on its `data:` depends on them.

    theta = sum of w_i (F_i + epsilon) theta_i / sum of w_i (F_i + epsilon). F_i is the mean over
    examples of the squared gradient of the log-likelihood of the example's counted tokens. Where
    no source's likelihood hangs on an element, that is the weighted mean; so is a tensor that no
    parameter of the loaded model, and no part of one, is made of.

    Args:
        weight: how much a source counts: times its importances.
        normalize: give each source's importances the root mean square 1 (`l2`, the authors' code),
            the mean 1 (`sum`), or leave them, so that sources with larger gradients win (`none`).
        epsilon: added to every importance; 1 is their usual size.
    """
    importances = statistics.complete
    if importances is None:
        return weighted_mean(weight, models)
    scales = importance_scales([item.about for item in importances], normalize)
    shares = [
        (item.span(at.start, len(model), model) * scale + epsilon) * w
        for item, model, scale, w in zip(importances, models, scales, weight, strict=True)
    ]
    total = sum(shares[1:], start=shares[0])
    merged = models[0] * 1.0  # a copy: a block is a worker's buffer
    for share, model in zip(shares[1:], models[1:], strict=True):
        merged = merged + (model - models[0]) * (share / total)
    return merged
