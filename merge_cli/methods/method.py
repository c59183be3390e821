"""A merge method: a function, and what the engine must know about it.

A method is a pure function on spans of tensors. The names of its positional parameters say what
the engine must supply, the keyword-only ones are the recipe's schema (see `parameters`):

    base      the base model's span                                    -> the method needs a base
    models    every source's span, as it is                            -> weights
    deltas    every source's span minus the base's                     -> task vectors
    at        the `Span`: which elements of which tensor these are, and the recipe's seed
    prepared  what `tensor_pass` returned for this tensor
    coefficients  this tensor's part of the recipe's `coefficients:` file, or of what is learned
    statistics    this tensor's calibration statistics of every source, over its `data:`

All spans are flat, upcast (float32; float64 where a source is) and of equal length; the method
returns a span of the same length, which the engine rounds once. A method that must see the whole
tensor before it can treat an element (a norm, a threshold) declares a `tensor_pass`, one that must
see the whole model a `model_pass`: both get block readers, so that no tensor has to fit in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from merge_cli.kernels.fused import FusedForm
from merge_cli.methods.foreign import defined_in
from merge_cli.methods.parameters import MethodParameter, read_parameters
from merge_cli.recipe.schema import Parameters, Recipe

SUPPLIED = ("base", "models", "deltas", "at", "prepared", "coefficients", "statistics")


@dataclass(frozen=True)
class Method:
    """A registered method: the function and what the engine must know about it.

    Attributes:
        count: (least, most) number of sources; most None means any.
        tensor_pass: `tensor_pass(tensor, model, **parameters)` -> `prepared`, once for each tensor;
            `model` is what `model_pass` returned. It may look at the parameters that its signature
            names; `**_` takes those that it does not look at.
        model_pass: `model_pass(model)` -> anything or None, once for each merge (see
            `blocks.ModelBlocks`).
        count_kept: `count_kept(block, prepared, parameters)` -> elements that each operand keeps.
        ranks_magnitudes: whether those passes find exact thresholds among magnitudes, which takes
            memory of its own.
        extra_memory: `extra_memory(shape, **parameters)` -> arrays of a whole tensor's size that
            `tensor_pass` holds besides the operands; 0 where it works block by block. Memory grows
            with the largest tensor.
        is_identity: `is_identity(**parameters)` -> True where the output is its only source, byte
            for byte.
        check: `check(**parameters it names)` -> why this combination cannot be merged, or "".
        resolve_variant: `resolve_variant(recipe)` -> the method of another formula that this recipe
            means, or None.
        supports_numpy: made of operators and `merge_cli.kernels` alone, so that it takes numpy
            arrays as well as tensors: then a merge on a CPU runs compiled and does without torch.
        fused: `fused(at, prepared, **parameters)` -> the formula as `kernels.fused` computes it in
            one compiled loop, with the same bits: for a tensor whose elements are stored plainly.
        fused_unread: `fused_unread(at, size, model_pass, **parameters)` -> the same before
            `tensor_pass`, for a tensor of which nothing must be known first, or None. `size` says
            that the tensor is merged in one block: then the loop ranks its magnitudes itself.
        searches: what is merged, and with which parameters, is searched first.
        automatic: several methods are tried first, and the best of them merges.
        is_short_form: a recipe that names it is read into one of another method.
        gathers: the calibration statistics of every source over its `data:` that it needs: gram or
            fisher; empty for none.
        base_is_source: the base is the first of the sources (slerp).
        averages_base: `averages_base(recipe, shared parameters, the closest first)` -> whether a
            base that `models` does not list is one more model, as in mergekit.
    """

    name: str
    function: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    paper: str = ""
    count: tuple[int, int | None] = (1, None)
    tensor_pass: Callable[..., Any] | None = None
    model_pass: Callable[..., Any] | None = None
    count_kept: Callable[..., list[int]] | None = None
    ranks_magnitudes: bool = False
    extra_memory: Callable[..., int] | None = None
    is_identity: Callable[..., bool] | None = None
    check: Callable[..., str] | None = None
    resolve_variant: Callable[[Recipe], Method | None] | None = None
    supports_numpy: bool = False
    fused: Callable[..., FusedForm] | None = None
    fused_unread: Callable[..., FusedForm | None] | None = None
    searches: bool = False
    automatic: bool = False
    is_short_form: bool = False
    gathers: str = ""
    base_is_source: bool = False
    averages_base: Callable[[Recipe, Sequence[Parameters]], bool] | None = None

    @property
    def module(self) -> str:
        """The module that defines it."""
        return defined_in(self.function)

    @cached_property
    def parameters(self) -> dict[str, MethodParameter]:
        """The recipe's schema for this method."""
        return read_parameters(inspect.unwrap(self.function))

    @cached_property
    def supplied(self) -> frozenset[str]:
        """What the engine must supply: the names of the function's positional parameters."""
        return frozenset(positional(self.function)) & frozenset(SUPPLIED)

    @cached_property
    def cache_key_parameters(self) -> tuple[str, ...] | None:
        """The parameters that `tensor_pass` looks at; None where it may look at all of them.

        With the same values of these, and without a `model_pass`, it gives the same answer.
        """
        if self.tensor_pass is None:
            return ()
        _, _, *options = inspect.signature(self.tensor_pass).parameters.values()
        if any(o.kind is inspect.Parameter.VAR_KEYWORD and o.name != "_" for o in options):
            return None
        return tuple(option.name for option in options if option.name in self.parameters)

    @property
    def needs_base(self) -> bool:
        """Whether the formula contains the base model."""
        return "base" in self.supplied or "deltas" in self.supplied

    @property
    def learns(self) -> bool:
        """Whether coefficients are learned first where the recipe names no file of them."""
        return "coefficients" in self.supplied

    @property
    def plain(self) -> bool:
        """Whether it needs nothing but models and parameters: no data, no search, no window."""
        return not self.preparation and not self.is_short_form

    @property
    def preparation(self) -> str:
        """What must happen before a merge by it (`planning.preparation`); empty: nothing."""
        if self.learns:
            return "learning"
        if self.searches:
            return "search"
        if self.automatic:
            return "automatic"
        return "calibration" if self.gathers else ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(inspect.unwrap(self.function)) or "").partition("\n")[0]


def positional(function: Callable[..., Any]) -> list[str]:
    """The names of a function's positional parameters."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
