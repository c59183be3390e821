"""TIES: trim, elect sign, disjoint merge. Yadav et al., arXiv:2306.01708.

The paper's code and mergekit differ in five points; `semantics` sets them all at once, and each
can be set by itself. `trim: model` and the paper's rule for a sum of 0 look at the whole model
before the merge, in streamed passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from merge_cli.errors import UsageError
from merge_cli.kernels.backend import Array
from merge_cli.kernels.cut import ALL_TIES, MagnitudeThreshold, count_kept, trimmed
from merge_cli.kernels.elect import DivideBy, disjoint_mean
from merge_cli.kernels.reduce import add_scaled, weighted_sum
from merge_cli.kernels.select import magnitude_cuts
from merge_cli.methods.blocks import Block, ModelBlocks, RowStream, Span, TensorBlocks
from merge_cli.methods.parameters import Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.rescaling import RescaleL1, l1_factors, rescaled

Semantics = Literal["mergekit", "paper"]
Cuts = list[MagnitudeThreshold | None]


@dataclass(frozen=True)
class TiesSurvey:
    """What the whole model had to be read for.

    Attributes:
        cuts: tensor name -> one cut for each delta; empty under `trim: tensor`.
        zero_sign: the sign that most elements of the whole model elect; None if not asked for.
    """

    cuts: Mapping[str, Cuts]
    zero_sign: float | None


@dataclass(frozen=True)
class Trim:
    """What one tensor is trimmed, rescaled and elected with."""

    cuts: Cuts
    zero_sign: float
    factors: list[float]


def survey(model: ModelBlocks) -> TiesSurvey | None:
    """Whole-model thresholds and majority sign, where the recipe asks for them.

    Raises:
        UsageError: rules for the whole model that differ between its tensors.
    """
    rules = {_model_rule(tensor) for tensor in model.tensors}
    if len(rules) > 1:
        message = (
            "trim and zero_sign over the whole model need the same sources and the same semantics, "
        )
        message += "trim, zero_sign and density for every tensor"
        raise UsageError(message, hint="Use one number for each model, without gradient or filter.")
    by_model, majority, *_ = rules.pop()
    if not (by_model or majority):
        return None
    cuts = _model_cuts(model) if by_model else {}
    return TiesSurvey(cuts, _majority_sign(model, cuts) if majority else None)


def prepare(tensor: TensorBlocks, found: TiesSurvey | None, **parameters: Any) -> Trim:
    """The cuts of one tensor."""
    zero_sign = 1.0 if found is None or found.zero_sign is None else found.zero_sign
    known = found.cuts.get(tensor.name) if found else None
    cuts = _tensor_cuts(tensor) if known is None else known
    factors = l1_factors(
        tensor,
        densities(parameters),
        parameters["rescale"],
        lambda deltas, start: trimmed(deltas, cuts, start),
    )
    return Trim(cuts, zero_sign, factors)


def kept(block: Block, prepared: Trim, parameters: Mapping[str, Any]) -> list[int]:
    """How many elements each trimmed task vector keeps in a block."""
    return [
        count_kept(delta, cut, block.at.start)
        for delta, cut in zip(block.operands, prepared.cuts, strict=True)
    ]


@merge_method(
    "ties",
    paper="arXiv:2306.01708",
    prepare=prepare,
    survey=survey,
    kept=kept,
    any_array=True,
    prepare_uses=("density", "semantics", "rescale"),
)
def ties(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: Trim,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density | None] = each(None),
    normalize: bool = True,
    rescale: RescaleL1 = False,
    lambda_: float = 1.0,
    semantics: Semantics = "mergekit",
    trim: Literal["tensor", "model"] | None = None,
    elect: Literal["weighted", "unweighted"] | None = None,
    divisor: Literal["weights", "count"] | None = None,
    zero_sign: Literal["positive", "majority"] | None = None,
) -> Array:
    """Keep the largest changes, elect a sign for each element, average those that agree.

    Args:
        weight: how much of each task vector goes in.
        density: share of each task vector's elements that is kept, the largest by magnitude,
            exactly int(density * n), but at least one, ties to the lower index. Default 1
            (mergekit) or 0.2 (paper).
        normalize: divide by what agrees (see divisor); false gives the plain sum.
        rescale: multiply what is kept by its L1 norm before trimming over after (`l1`, or true).
        lambda_: scale of the whole change.
        semantics: sets density, trim, elect, divisor and zero_sign to mergekit's or the paper's
            rule where they are not given.
        trim: rank magnitudes within each tensor (mergekit) or over the whole model (paper).
        elect: elect the sign of the weighted (mergekit) or the unweighted (paper) sum.
        divisor: divide by the sum of the agreeing weights (mergekit) or their number (paper).
        zero_sign: a sum of exactly 0 elects plus (mergekit) or the sign that most elements of the
            model have (paper).
    """
    paper = semantics == "paper"
    by_mode: DivideBy = divisor or ("count" if paper else "weights")
    mixed = disjoint_mean(
        rescaled(trimmed(deltas, prepared.cuts, at.start), prepared.factors),
        weight,
        weighted_election=_or(elect, "unweighted" if paper else "weighted") == "weighted",
        divide_by=by_mode if normalize else "nothing",
        zero_sign=prepared.zero_sign,
    )
    return add_scaled(base, lambda_, mixed)


def densities(parameters: Mapping[str, Any]) -> list[float]:
    """The density of each source, with the default that `semantics` sets."""
    default = 0.2 if parameters["semantics"] == "paper" else 1.0
    return [default if given is None else given for given in parameters["density"]]


def _model_rule(tensor: TensorBlocks) -> tuple[Any, ...]:
    """(trim over the model?, majority sign?, and what must then be the same for every tensor)."""
    parameters = tensor.parameters
    paper = parameters["semantics"] == "paper"
    by_model = _or(parameters["trim"], "model" if paper else "tensor") == "model"
    majority = _or(parameters["zero_sign"], "majority" if paper else "positive") == "majority"
    density = tuple(densities(parameters)) if by_model else ()
    sources = len(parameters["weight"]) if by_model else 0
    return by_model, majority, density, sources


def _or(given: str | None, default: str) -> str:
    return default if given is None else given


def _wide(block: Block) -> list[Array]:
    """float32 among float64: one bit pattern for all that are ranked together."""
    return [delta.double() for delta in block.operands]


def _tensor_cuts(tensor: TensorBlocks) -> Cuts:
    return magnitude_cuts(densities(tensor.parameters), RowStream(tensor))


def _model_cuts(model: ModelBlocks) -> dict[str, Cuts]:
    """Exact thresholds over all tensors together; ties to the lower (tensor, index)."""
    offsets = accumulate((tensor.size for tensor in model.tensors), initial=0)
    wide = any(tensor.wide for tensor in model.tensors)
    stream = RowStream(model, _wide) if wide else RowStream(model)
    whole = magnitude_cuts(densities(model.tensors[0].parameters), stream)
    return {
        tensor.name: [cut and _within(cut, offset, tensor.size) for cut in whole]
        for tensor, offset in zip(model.tensors, offsets, strict=False)
    }


def _within(cut: MagnitudeThreshold, offset: int, size: int) -> MagnitudeThreshold:
    """A whole-model cut as one of its tensors sees it."""
    if cut.last_tie >= offset + size:
        return MagnitudeThreshold(cut.threshold, ALL_TIES)
    return MagnitudeThreshold(cut.threshold, max(cut.last_tie - offset, -1))


def _majority_sign(model: ModelBlocks, cuts: Mapping[str, Cuts]) -> float:
    """The sign of the sum, over all elements of the model, of the sign that each one elects."""
    known = {tensor.name: tensor.parameters for tensor in model.tensors}
    own = {tensor.name: cuts.get(tensor.name) or _tensor_cuts(tensor) for tensor in model.tensors}

    def balance(blocks: Iterator[Block]) -> int:
        total = 0
        for block in blocks:
            parameters = known[block.at.name]
            paper = parameters["semantics"] == "paper"
            rule = _or(parameters["elect"], "unweighted" if paper else "weighted")
            kept = trimmed(block.operands, own[block.at.name], block.at.start)
            weights = parameters["weight"] if rule == "weighted" else [1.0] * len(kept)
            votes = weighted_sum(weights, kept)
            total += int((votes > 0).sum()) - int((votes < 0).sum())
        return total

    total = sum(model.map(balance))
    return float((total > 0) - (total < 0))
