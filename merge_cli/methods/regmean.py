"""RegMean: merging linear layers by regression on their inputs. Jin et al., arXiv:2212.09849.

A layer W [out, in] that does on every source's inputs X_i [tokens, in] what the source's own W_i
does minimises sum of ||X_i W^T - X_i W_i^T||^2. With G_i = X_i^T X_i the solution is

    W = (sum of W_i G_i) (sum of G_i)^-1

The matrices are calibrated beforehand (`merge_cli.calibration`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from merge_cli.methods.blocks import Span, TensorBlocks
from merge_cli.methods.consensus import no_average, weighted_mean
from merge_cli.methods.parameters import PerModel, Range, Share, each
from merge_cli.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor

_DEFINITE = 0.999  # up to this alpha the scaled sum is definite enough to be factored
_CHUNK = 1 << 20  # elements of a layer that are worked on at once
_SINGULAR = 1e-6  # of the largest eigenvalue: below it float32 matrices say nothing


def regressed(
    tensor: TensorBlocks, model: None, *, alpha: float, weight: Sequence[float], **_: Any
) -> Tensor | None:
    """What regression adds to the mean layer, flat; None for what is no layer, or was never used.

    Rows of all sources are read anew for each source's matrix, so that beside the result two
    matrices and some rows are held, not the layers.
    """
    import torch

    models = tensor.statistics.complete if tensor.statistics is not None else None
    if models is None:
        return None
    first = models[0].entry.input_first
    like = next(_rows(tensor))[1][0]
    missing = torch.zeros(tensor.shape, dtype=torch.float64, device=like.device)
    total: Any = 0.0
    for source, (item, w) in enumerate(zip(models, weight, strict=True)):
        gram = _shrunk(item.whole(like).double(), alpha).mul_(w)
        for start, rows in _rows(tensor):
            change = rows[source] - weighted_mean(weight, rows)
            stop = start + len(change)
            if first:
                missing.addmm_(gram[:, start:stop], change)
            else:
                missing[start:stop].addmm_(change, gram)
        total = gram.add_(total)
    _divide(missing.T if first else missing, total, alpha)
    return missing.reshape(-1).to(torch.float64 if tensor.wide else torch.float32)


def _rows(tensor: TensorBlocks) -> Iterator[tuple[int, list[Tensor]]]:
    """The number of a row, and from there on some rows of every source [rows, width] in float64.

    As many each time as the tensor's shape says: how it is read must not change what is computed.
    """
    import torch

    width = tensor.shape[-1]
    size = max(1, _CHUNK // width) * width
    start = 0
    parts: list[Tensor] = []
    for block in tensor.blocks():
        # Copies: a block is a worker's buffer, and the next one is read into it.
        fresh = [operand.to(torch.float64, copy=True) for operand in block.operands]
        parts = [torch.cat(pair) for pair in zip(parts, fresh, strict=True)] if parts else fresh
        while len(parts[0]) >= size:
            yield start, [part[:size].reshape(-1, width) for part in parts]
            start, parts = start + size // width, [part[size:] for part in parts]
    if len(parts[0]):
        yield start, [part.reshape(-1, width) for part in parts]


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    """alpha * G + (1 - alpha) * diag(G): the paper's equation for off-diagonal elements."""
    diagonal = gram.diagonal().clone()
    gram.mul_(alpha).diagonal().copy_(diagonal)
    return gram


def _divide(right: Tensor, gram: Tensor, alpha: float) -> None:
    """right [out, in] times the inverse of gram [in, in], in place; 0 where there is none.

    Inputs are measured in their own root mean squares first, as they differ by orders.
    """
    import torch

    used = gram.diagonal() > 0  # an input that no data set excites has a row of zeros
    scale = gram.diagonal()[used].rsqrt()
    scaled = gram[used][:, used].mul_(scale[:, None]).mul_(scale)
    if alpha <= _DEFINITE:  # no eigenvalue is below 1 - alpha
        factor = torch.linalg.cholesky(scaled)
    else:
        values, vectors = torch.linalg.eigh(scaled)
        significant = values > _SINGULAR * values[-1]
        factor = vectors[:, significant] / values[significant].sqrt()
    step = max(1, _CHUNK // len(gram))
    for start in range(0, len(right), step):
        rows = right[start : start + step]
        scaled_rows = rows[:, used] * scale
        if alpha <= _DEFINITE:
            solved = torch.cholesky_solve(scaled_rows.T, factor).T
        else:
            solved = (scaled_rows @ factor) @ factor.T
        rows.zero_()
        rows[:, used] = solved * scale


def _held(*, shape: tuple[int, ...], weight: Sequence[float], **_: Any) -> int:
    """Arrays of the tensor's size: the result twice over, three matrices, some rows."""
    if len(shape) != 2:
        return 0
    elements = 3 * shape[0] * shape[1] + 8 * shape[1] ** 2 + 8 * _CHUNK * len(weight)
    return max(1, -(-elements // (shape[0] * shape[1])) - len(weight))


@merge_method(
    "regmean",
    paper="arXiv:2212.09849",
    tensor_pass=regressed,
    check=no_average,
    extra_memory=_held,
    gathers="gram",
)
def regmean(
    models: list[Tensor],
    at: Span,
    prepared: Tensor | None,
    *,
    alpha: Share = 0.9,
    weight: PerModel[Annotated[float, Range(0.0)]] = each(1.0),
) -> Tensor:
    """Merge linear layers by least squares on each source's own inputs, from its `data:`.

    W = (sum of w_i W_i G~_i) (sum of w_i G~_i)^-1 with G~ = alpha G + (1 - alpha) diag(G), and
    G = X^T X / tokens for the inputs X [tokens, in] of a layer [out, in] of the source; computed
    in float64. Everything else (norms, biases, embeddings, a head that is tied to them, experts
    that run fused) is the weighted mean, and so are the weights of an input that is 0 in every
    example. Only with alpha above 0.999 is the sum of matrices taken to be singular: then
    the minimum that is nearest to the mean.

    Args:
        alpha: 1 is plain regression; smaller trusts correlations of inputs less (T5: 0.1).
        weight: how much a source counts; its number of tokens does not matter.
    """
    if prepared is None:
        mean: Tensor = weighted_mean(weight, models)
        return mean
    change = prepared[at.start : at.start + len(models[0])]
    merged: Tensor = weighted_mean(weight, models) + change  # equal layers stay what they are
    return merged
