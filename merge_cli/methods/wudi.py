"""WUDI: whoever started the interference should end it. Cheng et al., arXiv:2503.08099.

The rows of a linear layer's task vector lie in the space that its inputs span. So the merged task
vector should differ from each source's only across that source's rows, where its inputs do not go:

    L = sum over sources of ||(tau_m - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2

With G = sum of tau_i^T tau_i / ||tau_i||^2 and R = sum of tau_i tau_i^T tau_i / ||tau_i||^2 the
gradient is 2 (tau_m G - R). No data, and no coefficient to choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from merge_cli.methods.blocks import Span, TensorBlocks, load_whole
from merge_cli.methods.parameters import Range
from merge_cli.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor

# Matrices that are looked up rather than multiplied with, or whose rows are tokens.
_LOOKED_UP = ("embed", "wte", "wpe", "lm_head", "shared.weight")
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's
_SINGULAR = 1e-10  # of the largest eigenvalue of G: below it there is no row of any source


def without_interference(
    tensor: TensorBlocks,
    model: None,
    *,
    iterations: int,
    learning_rate: float,
    solver: str,
    input_first: bool,
    **_: Any,
) -> Tensor | None:
    """The merged task vector of a linear layer, flat; None for a tensor that is none."""
    if len(tensor.shape) != 2 or any(part in tensor.name for part in _LOOKED_UP):
        return None
    deltas = load_whole(tensor)[1]
    if input_first:
        deltas = [delta.T for delta in deltas]
    dtype = deltas[0].dtype
    if solver == "exact":  # squares need twice the digits
        deltas = [delta.double() for delta in deltas]
    gram, target = _system(deltas)
    merged = sum(deltas[1:], start=deltas[0].clone())
    if solver == "exact":
        merged = _nearest(merged, gram, target)
    else:
        _descend(merged, gram, target, iterations, learning_rate)
    change: Tensor = (merged.T if input_first else merged).reshape(-1).to(dtype)
    return change


def _system(deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """G [in, in] and R [out, in]; a source that has not moved says nothing."""
    import torch

    out, inputs = deltas[0].shape
    gram, target = deltas[0].new_zeros(inputs, inputs), torch.zeros_like(deltas[0])
    for delta in deltas:
        square = float(delta.double().square().sum())
        if square:
            products = delta.T @ delta / square
            gram += products
            target += delta @ products
    return gram, target


def _descend(
    merged: Tensor, gram: Tensor, target: Tensor, iterations: int, learning_rate: float
) -> None:
    """Adam on L, in place."""
    import torch

    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, iterations + 1):
        gradient = (merged @ gram).sub_(target).mul_(2)
        first.mul_(_BETAS[0]).add_(gradient, alpha=1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        merged.addcdiv_(first, scale, value=-learning_rate / (1 - _BETAS[0] ** step))


def _nearest(start: Tensor, gram: Tensor, target: Tensor) -> Tensor:
    """The minimum of L that is nearest to `start`: where plain gradient descent would end."""
    import torch

    values, vectors = torch.linalg.eigh(gram)
    used = values > _SINGULAR * values[-1]
    basis = vectors[:, used]
    missing = target - start @ gram
    nearest: Tensor = start + (missing @ basis / values[used]) @ basis.T
    return nearest


@merge_method(
    "wudi",
    paper="arXiv:2503.08099",
    tensor_pass=without_interference,
    extra_memory=lambda **_: 16,
)
def wudi(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: Tensor | None,
    *,
    iterations: Annotated[int, Range(0)] = 300,
    learning_rate: Annotated[float, Range(0.0, above=True)] = 1e-5,
    solver: Literal["descent", "exact"] = "descent",
    input_first: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Merge linear layers so that no task vector disturbs another's inputs; without data.

    Everything else (norms, biases, embeddings, heads) is the mean of the task vectors.

    Args:
        iterations: steps of Adam for each layer, from the sum of the task vectors.
        learning_rate: Adam's.
        solver: the paper's descent, or the minimum itself that is nearest to the sum (`exact`).
        input_first: the layers are stored [in, out], as GPT-2's are.
        lambda_: scale of the whole change.
    """
    if prepared is None:
        return base + lambda_ * (sum(deltas[1:], start=deltas[0]) / len(deltas))
    change: Tensor = prepared[at.start : at.start + len(base)]
    return base + lambda_ * change
