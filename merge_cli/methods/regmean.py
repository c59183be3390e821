"""RegMean: merging linear layers by regression on their inputs. Jin et al., arXiv:2212.09849.

A layer W [out, in] that does on every source's inputs X_i [tokens, in] what the source's own W_i
does minimises sum of ||X_i W^T - X_i W_i^T||^2. With G_i = X_i^T X_i the solution is

    W = (sum of W_i G_i) (sum of G_i)^-1

The matrices are gathered beforehand (`merge_cli.gathering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from merge_cli.checkpoint.statistics import ModelStatistics, TensorStatistics
from merge_cli.methods.blocks import Span, TensorBlocks, gathered
from merge_cli.methods.parameters import PerModel, Range, Share, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.soup import weights_cancel

if TYPE_CHECKING:
    from torch import Tensor

_DEFINITE = 0.999  # up to this alpha the scaled sum is definite enough to be factored
_SINGULAR = 1e-6  # of the largest eigenvalue: below it float32 matrices say nothing


def no_average(weight: Sequence[float]) -> str:
    """Why these weights have no average."""
    return weights_cancel(weight, True)


def regressed(
    tensor: TensorBlocks, survey: None, *, alpha: float, weight: Sequence[float], **_: Any
) -> Tensor | None:
    """The merged layer, flat; None for what is no linear layer, or was never used."""
    models = tensor.statistics.complete if tensor.statistics is not None else None
    if models is None:
        return None
    layers = gathered(tensor)[1]
    kind = layers[0].dtype
    layers = [_output_first(layer.double(), one) for layer, one in zip(layers, models, strict=True)]
    mean = weighted_mean(weight, layers)
    missing, total = mean.new_zeros(mean.shape), mean.new_zeros(mean.shape[1], mean.shape[1])
    for layer, one, w in zip(layers, models, weight, strict=True):
        gram = _shrunk(one.whole(layer).double(), alpha).mul_(w)
        total += gram
        missing += (layer - mean) @ gram
    # From the mean on: equal layers stay what they are, and so does what no input reaches.
    found = mean.add_(_divided(missing, total, alpha))
    merged: Tensor = _output_first(found, models[0]).reshape(-1).to(kind)
    return merged


def weighted_mean(weight: Sequence[float], arrays: Sequence[Any]) -> Any:
    """Sum of w_i * x_i over the sum of w_i, from the first array on: equal arrays stay equal."""
    total = sum(weight)
    merged = arrays[0] * 1.0  # the lane's buffer is not ours
    for w, array in zip(weight[1:], arrays[1:], strict=True):
        merged = merged + (w / total) * (array - arrays[0])
    return merged


def _output_first(layer: Tensor, about: ModelStatistics) -> Tensor:
    """[out, in], or back: a layer that is stored [in, out] is turned over."""
    return layer.T if about.entry.input_first else layer


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    """alpha * G + (1 - alpha) * diag(G): the paper's equation for off-diagonal elements."""
    diagonal = gram.diagonal().clone()
    gram.mul_(alpha).diagonal().copy_(diagonal)
    return gram


def _divided(right: Tensor, gram: Tensor, alpha: float) -> Tensor:
    """right [out, in] times the inverse of gram [in, in], where there is one; else 0.

    Inputs are measured in their own root mean squares first, as they differ by orders.
    """
    import torch

    used = gram.diagonal() > 0  # an input that no data set excites has a row of zeros
    result = torch.zeros_like(right)
    if not used.any():
        return result
    scale = gram.diagonal()[used].rsqrt()
    scaled = gram[used][:, used] * scale[:, None] * scale
    wanted = right[:, used] * scale
    if alpha <= _DEFINITE:  # no eigenvalue is below 1 - alpha
        factor = torch.linalg.cholesky(scaled)
        solved = torch.cholesky_solve(wanted.T, factor).T
    else:
        values, vectors = torch.linalg.eigh(scaled)
        known = values > _SINGULAR * values[-1]
        basis = vectors[:, known]
        solved = (wanted @ basis / values[known]) @ basis.T
    result[:, used] = solved * scale
    return result


@merge_method(
    "regmean", paper="arXiv:2212.09849", prepare=regressed, prepare_uses=("alpha", "weight"),
    check=no_average, whole=lambda **_: 32, gathers="gram",
)  # fmt: skip
def regmean(
    models: list[Tensor],
    at: Span,
    prepared: Tensor | None,
    statistics: TensorStatistics,
    *,
    alpha: Share = 0.9,
    weight: PerModel[Annotated[float, Range(0.0)]] = each(1.0),
) -> Tensor:
    """Merge linear layers by least squares on each source's own inputs, from its `data:`.

    W = (sum of w_i W_i G~_i) (sum of w_i G~_i)^-1 with G~ = alpha G + (1 - alpha) diag(G), and
    G = X^T X / tokens for the inputs X [tokens, in] of a layer [out, in] of the source; computed
    in float64. Everything else (norms, biases, embeddings, a head that is tied to them, experts
    that are stored fused) is the weighted mean, and so is the weight of an input that is 0 in
    every example. Only with alpha above 0.999 is the sum of matrices taken to be singular: then
    the minimum that is nearest to the mean.

    Args:
        alpha: 1 is plain regression; smaller trusts correlations of inputs less (T5: 0.1).
        weight: of a source; a token of each counts alike, however many there are.
    """
    if prepared is None:
        mean: Tensor = weighted_mean(weight, models)
        return mean
    merged: Tensor = prepared[at.start : at.start + len(models[0])]
    return merged
