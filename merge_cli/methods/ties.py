"""TIES: trim, elect sign, disjoint merge. Yadav et al., arXiv:2306.01708.

The paper's code and mergekit differ in five points; `semantics` sets them all at once, and each
can be set by itself. `trim: model` and the paper's rule for a sum of 0 look at the whole model
before the merge, in streamed passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from merge_cli.errors import UsageError
from merge_cli.kernels.backend import Array
from merge_cli.kernels.cut import ALL_TIES, Cuts, MagnitudeThreshold, trimmed
from merge_cli.kernels.elect import DivideBy, disjoint_mean
from merge_cli.kernels.fused import Election, FusedForm, Ranks
from merge_cli.kernels.reduce import add_scaled, weighted_sum
from merge_cli.kernels.select import magnitude_cuts, trimmed_count
from merge_cli.methods.blocks import Block, ModelBlocks, RowStream, Span, TensorBlocks
from merge_cli.methods.consensus import Elect
from merge_cli.methods.parameters import Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.sparsification import (
    MagnitudeTrim,
    RescaleL1,
    count_kept,
    tensor_cuts,
    trim_factors,
)

Semantics = Literal["mergekit", "paper"]
Trimming = Literal["tensor", "model"]
ZeroSign = Literal["positive", "majority"]


@dataclass(frozen=True)
class Rules:
    """The five points, as `semantics` and what is given besides decide them."""

    density: Sequence[float]
    trim: Trimming
    elect: Elect
    divide_by: DivideBy
    zero_sign: ZeroSign


def rules(
    semantics: Semantics,
    density: Sequence[float | None],
    trim: Trimming | None = None,
    elect: Elect | None = None,
    divisor: DivideBy | None = None,
    zero_sign: ZeroSign | None = None,
) -> Rules:
    """What is given, and the paper's or mergekit's rule for the rest."""
    paper = semantics == "paper"
    usual = 0.2 if paper else 1.0
    return Rules(
        [usual if share is None else share for share in density],
        trim or ("model" if paper else "tensor"),
        elect or ("unweighted" if paper else "weighted"),
        divisor or ("count" if paper else "weights"),
        zero_sign or ("majority" if paper else "positive"),
    )


@dataclass(frozen=True)
class WholeModel:
    """What the whole model had to be read for.

    Attributes:
        cuts: tensor name -> one cut for each delta; empty under `trim: tensor`.
        zero_sign: the sign that most elements of the whole model elect; None if not asked for.
    """

    cuts: Mapping[str, Cuts]
    zero_sign: float | None


@dataclass(frozen=True)
class TiesTrim(MagnitudeTrim):
    """What one tensor is trimmed and rescaled with, and the sign that a sum of 0 elects."""

    zero_sign: float = 1.0


def read_model(model: ModelBlocks) -> WholeModel | None:
    """Whole-model thresholds and majority sign, where the recipe asks for them.

    Raises:
        UsageError: rules for the whole model that differ between its tensors.
    """
    asked = {_model_rule(tensor) for tensor in model.tensors}
    if len(asked) > 1:
        message = (
            "trim and zero_sign over the whole model need the same sources and the same semantics, "
        )
        message += "trim, zero_sign and density for every tensor"
        raise UsageError(message, hint="Use one number for each model, without gradient or filter.")
    by_model, majority, *_ = asked.pop()
    if not (by_model or majority):
        return None
    cuts = _model_cuts(model) if by_model else {}
    return WholeModel(cuts, _majority_sign(model, cuts) if majority else None)


def read_tensor(
    tensor: TensorBlocks,
    model: WholeModel | None,
    *,
    density: Sequence[float | None],
    semantics: Semantics,
    rescale: RescaleL1,
    **_: Any,
) -> TiesTrim:
    """The cuts of one tensor, and their factors."""
    shares = rules(semantics, density).density
    cuts = model.cuts.get(tensor.name) if model else None
    trim = MagnitudeTrim(tensor_cuts(tensor, shares) if cuts is None else cuts)
    factors = trim_factors(tensor, shares, rescale, trim.apply)
    zero_sign = 1.0 if model is None or model.zero_sign is None else model.zero_sign
    return TiesTrim(trim.cuts, factors, zero_sign)


def fused(
    at: Span,
    prepared: TiesTrim,
    *,
    weight: Sequence[float],
    density: Sequence[float | None],
    normalize: bool,
    lambda_: float,
    semantics: Semantics,
    elect: Elect | None,
    divisor: DivideBy | None,
    **_: Any,
) -> FusedForm:
    """The formula as one loop."""
    rule = rules(semantics, density, elect=elect, divisor=divisor)
    divide_by: DivideBy = rule.divide_by if normalize else "nothing"
    election = Election(rule.elect == "weighted", divide_by, prepared.zero_sign)
    return FusedForm(
        weight,
        scale=lambda_,
        drop=prepared.cuts,
        factors=prepared.factors,
        election=election,
    )


def fused_unread(
    at: Span,
    size: int | None,
    model: WholeModel | None,
    *,
    density: Sequence[float | None],
    semantics: Semantics,
    rescale: RescaleL1,
    **parameters: Any,
) -> FusedForm | None:
    """The same before the tensor is read, where its cuts are known or found in the loop."""
    if rescale in ("l1", True):
        return None
    cuts = model.cuts.get(at.name) if model else None
    if cuts is None and size is None:
        return None
    zero_sign = 1.0 if model is None or model.zero_sign is None else model.zero_sign
    shares = rules(semantics, density).density
    prepared = TiesTrim([None] * len(shares) if cuts is None else cuts, None, zero_sign)
    form = fused(at, prepared, density=density, semantics=semantics, **parameters)
    if cuts is not None or size is None:
        return form
    kept = [trimmed_count(share, size) for share in shares]
    return replace(form, drop=Ranks([None if count >= size else count for count in kept]))


@merge_method(
    "ties",
    paper="arXiv:2306.01708",
    model_pass=read_model,
    tensor_pass=read_tensor,
    count_kept=count_kept,
    ranks_magnitudes=True,
    supports_numpy=True,
    fused=fused,
    fused_unread=fused_unread,
)
def ties(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: TiesTrim,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density | None] = each(None),
    normalize: bool = True,
    rescale: RescaleL1 = False,
    lambda_: float = 1.0,
    semantics: Semantics = "mergekit",
    trim: Trimming | None = None,
    elect: Elect | None = None,
    divisor: Literal["weights", "count"] | None = None,
    zero_sign: ZeroSign | None = None,
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
    rule = rules(semantics, density, elect=elect, divisor=divisor)
    mixed = disjoint_mean(
        prepared.apply(deltas, at),
        weight,
        weighted_election=rule.elect == "weighted",
        divide_by=rule.divide_by if normalize else "nothing",
        zero_sign=prepared.zero_sign,
    )
    return add_scaled(base, lambda_, mixed)


def _rules_of(parameters: Mapping[str, Any]) -> Rules:
    names = ("semantics", "density", "trim", "elect", "divisor", "zero_sign")
    return rules(**{name: parameters[name] for name in names})


def _model_rule(tensor: TensorBlocks) -> tuple[Any, ...]:
    """(trim over the model?, majority sign?, and what must then be the same for every tensor)."""
    rule = _rules_of(tensor.parameters)
    by_model = rule.trim == "model"
    sources = len(tensor.parameters["weight"]) if by_model else 0
    shares = tuple(rule.density) if by_model else ()
    return by_model, rule.zero_sign == "majority", shares, sources


def _wide(block: Block) -> list[Array]:
    """float32 among float64: one bit pattern for all that are ranked together."""
    return [delta.double() for delta in block.operands]


def _model_cuts(model: ModelBlocks) -> dict[str, Cuts]:
    """Exact thresholds over all tensors together; ties to the lower (tensor, index)."""
    offsets = accumulate((tensor.size for tensor in model.tensors), initial=0)
    wide = any(tensor.wide for tensor in model.tensors)
    stream = RowStream(model, _wide) if wide else RowStream(model)
    model_cuts = magnitude_cuts(_rules_of(model.tensors[0].parameters).density, stream)
    return {
        tensor.name: [cut and _within(cut, offset, tensor.size) for cut in model_cuts]
        for tensor, offset in zip(model.tensors, offsets, strict=False)
    }


def _within(cut: MagnitudeThreshold, offset: int, size: int) -> MagnitudeThreshold:
    """A whole-model cut as one of its tensors sees it."""
    if cut.last_tie >= offset + size:
        return MagnitudeThreshold(cut.threshold, ALL_TIES)
    return MagnitudeThreshold(cut.threshold, max(cut.last_tie - offset, -1))


def _majority_sign(model: ModelBlocks, cuts: Mapping[str, Cuts]) -> float:
    """The sign of the sum, over all elements of the model, of the sign that each one elects."""
    rule_of = {tensor.name: _rules_of(tensor.parameters) for tensor in model.tensors}
    weights_of = {tensor.name: tensor.parameters["weight"] for tensor in model.tensors}
    cuts_of = {
        tensor.name: cuts.get(tensor.name) or tensor_cuts(tensor, rule_of[tensor.name].density)
        for tensor in model.tensors
    }

    def balance(blocks: Iterator[Block]) -> int:
        total = 0
        for block in blocks:
            name = block.at.name
            kept = trimmed(block.operands, cuts_of[name], block.at.start)
            by_weight = rule_of[name].elect == "weighted"
            votes = weighted_sum(weights_of[name] if by_weight else [1.0] * len(kept), kept)
            total += int((votes > 0).sum()) - int((votes < 0).sum())
        return total

    total = sum(model.map(balance))
    return float((total > 0) - (total < 0))
