"""Which methods there are. `@merge_method` records a function and hands it back untouched.

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

Packages add methods by the entry-point group `merge_cli.methods`; docs/methods.md shows how.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from merge_cli.errors import UsageError
from merge_cli.kernels.fused import FusedForm
from merge_cli.methods.foreign import OURS, defined_in, guarded
from merge_cli.methods.former_keywords import renamed
from merge_cli.methods.parameters import MethodParameter, read_parameters
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.schema import Parameters, Recipe
from merge_cli.recipe.statistics import Kind

F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINTS = "merge_cli.methods"
_BUILT_IN = (
    "soup",
    "checkpoint_average",
    "task_arithmetic",
    "ties",
    "dare",
    "della",
    "breadcrumbs",
    "sce",
    "ram",
    "model_stock",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "nearswap",
    "arcee_fusion",
    "passthrough",
    "wudi",
    "regmean",
    "fisher",
    "greedy_soup",
    "evolutionary",
    "dam",
    "auto",
)
_SUPPLIED = ("base", "models", "deltas", "at", "prepared", "coefficients", "statistics")


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
        return frozenset(_positional(self.function)) & frozenset(_SUPPLIED)

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


_METHODS: dict[str, Method] = {}
_BY_FUNCTION: dict[Callable[..., Any], Method] = {}


def merge_method(
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    paper: str = "",
    count: tuple[int, int | None] = (1, None),
    tensor_pass: Callable[..., Any] | None = None,
    model_pass: Callable[..., Any] | None = None,
    count_kept: Callable[..., list[int]] | None = None,
    ranks_magnitudes: bool = False,
    extra_memory: Callable[..., int] | None = None,
    is_identity: Callable[..., bool] | None = None,
    check: Callable[..., str] | None = None,
    resolve_variant: Callable[[Recipe], Method | None] | None = None,
    supports_numpy: bool = False,
    fused: Callable[..., FusedForm] | None = None,
    fused_unread: Callable[..., FusedForm | None] | None = None,
    gathers: Kind | Literal[""] = "",
    base_is_source: bool = False,
    averages_base: Callable[[Recipe, Sequence[Parameters]], bool] | None = None,
    listed: bool = True,
    **former: Any,
) -> Callable[[F], F]:
    """Record a merge method under `name` and its aliases; see `Method` for the capabilities.

    Args:
        listed: False for what only `resolve_variant` names, and no recipe.
        former: keywords of earlier versions, read with a DeprecationWarning.

    Raises:
        TypeError: the name is taken, a keyword is unknown, or a positional parameter is none that
            the engine supplies.
    """

    def record(function: F) -> F:
        unknown = set(_positional(function)) - set(_SUPPLIED)
        if unknown:
            raise TypeError(f"{name}: the engine supplies {_SUPPLIED}, not {sorted(unknown)}")
        method = Method(
            name,
            function,
            aliases,
            paper,
            count,
            tensor_pass=tensor_pass,
            model_pass=model_pass,
            count_kept=count_kept,
            ranks_magnitudes=ranks_magnitudes,
            extra_memory=extra_memory,
            is_identity=is_identity,
            check=check,
            resolve_variant=resolve_variant,
            supports_numpy=supports_numpy,
            fused=fused,
            fused_unread=fused_unread,
            gathers=gathers,
            base_is_source=base_is_source,
            averages_base=averages_base,
        )
        register(replace(method, **renamed(name, former)), listed=listed)
        return function

    return record


def register(method: Method, *, listed: bool = True) -> None:
    """Record a method under its names, if it is one that recipes may name.

    Raises:
        TypeError: a name is taken, or a signature cannot be read.
    """
    function = method.function
    if not method.module.startswith(OURS):
        _load_built_in()  # so that a name of ours is taken, whoever is imported first
        method = replace(method, **guarded(method, method.name))
    _ = method.parameters  # a signature that cannot be read fails here, at import
    _BY_FUNCTION[function] = method
    for key in (method.name, *method.aliases) if listed else ():
        if key in _METHODS and _METHODS[key].module != method.module:
            owner = _METHODS[key].module
            raise TypeError(f"merge method '{key}' is already defined by {owner}")
        _METHODS[key] = method


def _positional(function: Callable[..., Any]) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]


def get_method(name: str) -> Method:
    """The method of that name or alias.

    Raises:
        UsageError: there is none; names the nearest.
    """
    _load()
    if name not in _METHODS:
        raise UsageError(f"unknown merge method '{name}'.", hint=nearest(name, _METHODS))
    return _METHODS[name]


def method_of(function: Callable[..., Any]) -> Method:
    """The method that a decorated function is."""
    return _BY_FUNCTION[function]


def method_names() -> list[str]:
    """Every name and alias that a recipe may use, sorted."""
    _load()
    return sorted(_METHODS)


def all_methods() -> list[Method]:
    """Every method once: ours in the order from averaging to automation, then plugins by name."""
    _load()
    unique = {method.name: method for method in _METHODS.values()}
    built_in = {name: i for i, name in enumerate(_BUILT_IN)}

    def rank(method: Method) -> tuple[int, str]:
        module = method.module.removeprefix("merge_cli.methods.")
        return built_in.get(module, len(built_in)), method.name

    return sorted(unique.values(), key=rank)


@cache
def _load_built_in() -> None:
    """None of ours imports torch to be imported."""
    for module in _BUILT_IN:
        import_module(f"merge_cli.methods.{module}")


@cache
def _load() -> None:
    """Import the built-in methods, then plugins, once."""
    _load_built_in()
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            # A broken plugin must not look like a missing method: say which package it is.
            package = entry.dist.name if entry.dist else entry.value
            message = f"the plugin '{entry.name}' of package '{package}' failed to load: {error!r}"
            raise UsageError(message, hint=f"Fix or uninstall '{package}'.") from error
