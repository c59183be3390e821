"""Which methods there are. `@merge_method` records a function and hands it back untouched.

A method is a pure function on spans of tensors. The names of its positional parameters say what
the engine must supply, the keyword-only ones are the recipe's schema (see `parameters`):

    base      the base model's span                                    -> the method needs a base
    models    every source's span, as it is                            -> weights
    deltas    every source's span minus the base's                     -> task vectors
    at        the `Span`: which elements of which tensor these are, and the recipe's seed
    prepared  what `prepare` returned for this tensor
    coefficients  this tensor's part of the recipe's `coefficients:` file
    statistics  what was gathered of this tensor in every source, over its `data:`

All spans are flat, upcast (float32; float64 where a source is) and of equal length; the method
returns a span of the same length, which the engine rounds once. A method that must see the whole
tensor before it can treat an element (a norm, a threshold) declares `prepare`, one that must see
the whole model `survey`: both get block readers, so that no tensor has to fit in memory.

Packages add methods by the entry-point group `merge_cli.methods`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from merge_cli.errors import UsageError
from merge_cli.methods.parameters import MethodParameter, read_parameters
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.schema import Parameters, Recipe
from merge_cli.recipe.training import Kind

F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINTS = "merge_cli.methods"
_BUILT_IN = (
    "soup",
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
)
_SUPPLIED = ("base", "models", "deltas", "at", "prepared", "coefficients", "statistics")


@dataclass(frozen=True)
class Method:
    """A registered method: the function and what the engine must know about it.

    Attributes:
        count: (least, most) number of sources; most None means any.
        prepare: `prepare(tensor, survey, **parameters)` -> anything, once for each tensor.
        survey: `survey(model)` -> anything or None, once for each merge (see `blocks.ModelBlocks`).
        kept: `kept(block, prepared, parameters)` -> elements that each operand keeps.
        copies: `copies(**parameters)` -> True where the output is its only source, byte for byte.
        check: `check(**parameters it names)` -> why this combination cannot be merged, or "".
        any_array: made of operators and `merge_cli.kernels` alone, so that it takes numpy arrays as
            well as tensors: then a merge on a CPU runs compiled and does without torch.
        variant: `variant(recipe)` -> the method of another formula that this recipe means, or None.
        learns: without `coefficients:` in the recipe they are learned first.
        searches: what is merged, and with which parameters, is found first.
        whole: arrays of a whole tensor's size that `prepare` holds besides the operands, given the
            tensor's `shape` and the parameters; 0 where it works block by block. Memory grows with
            the largest tensor.
        gathers: statistics of every source over its `data:` that are gathered first: gram or
            fisher; empty for none.
        averages_base: `averages_base(recipe, shared parameters, the closest first)` -> whether a
            base that `models` does not list is one more model, as in mergekit.
        prepare_uses: the parameters that `prepare` looks at; None where it may look at all. With
            the same values of these and no survey, it gives the same answer.
    """

    name: str
    function: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    paper: str = ""
    count: tuple[int, int | None] = (1, None)
    base_is_source: bool = False
    prepare: Callable[..., Any] | None = None
    survey: Callable[..., Any] | None = None
    kept: Callable[..., list[int]] | None = None
    copies: Callable[..., bool] | None = None
    check: Callable[..., str] | None = None
    any_array: bool = False
    supplied: frozenset[str] = field(default_factory=frozenset)
    variant: Callable[[Recipe], Method | None] | None = None
    learns: bool = False
    searches: bool = False
    prepare_uses: tuple[str, ...] | None = None
    whole: Callable[..., int] | None = None
    gathers: str = ""
    averages_base: Callable[[Recipe, Sequence[Parameters]], bool] | None = None

    @cached_property
    def parameters(self) -> dict[str, MethodParameter]:
        """The recipe's schema for this method."""
        return read_parameters(self.function)

    @property
    def needs_base(self) -> bool:
        """Whether the formula contains the base model."""
        return "base" in self.supplied or "deltas" in self.supplied

    @property
    def plain(self) -> bool:
        """Whether it needs nothing but the recipe and the models: no data, no search."""
        return not self.preparation

    @property
    def preparation(self) -> str:
        """What must happen before a merge by it (`planning.preparation`); empty: nothing."""
        if self.learns:
            return "learning"
        if self.searches:
            return "search"
        return "calibration" if self.gathers else ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


_METHODS: dict[str, Method] = {}
_BY_FUNCTION: dict[Callable[..., Any], Method] = {}


def merge_method(
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    paper: str = "",
    count: tuple[int, int | None] = (1, None),
    base_is_source: bool = False,
    prepare: Callable[..., Any] | None = None,
    survey: Callable[..., Any] | None = None,
    kept: Callable[..., list[int]] | None = None,
    copies: Callable[..., bool] | None = None,
    check: Callable[..., str] | None = None,
    any_array: bool = False,
    variant: Callable[[Recipe], Method | None] | None = None,
    learns: bool = False,
    searches: bool = False,
    prepare_uses: tuple[str, ...] | None = None,
    whole: Callable[..., int] | None = None,
    gathers: Kind | Literal[""] = "",
    averages_base: Callable[[Recipe, Sequence[Parameters]], bool] | None = None,
    listed: bool = True,
) -> Callable[[F], F]:
    """Record a merge method under `name` and its aliases; see the module's text for the contract.

    Args:
        listed: False for a `variant`, which no recipe names.

    Raises:
        TypeError: the name is taken, or a positional parameter is none that the engine supplies.
    """

    def record(function: F) -> F:
        if not function.__module__.startswith("merge_cli."):
            _load_built_in()  # so that a name of ours is taken, whoever is imported first
        positional = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        unknown = set(positional) - set(_SUPPLIED)
        if unknown:
            raise TypeError(f"{name}: the engine supplies {_SUPPLIED}, not {sorted(unknown)}")
        method = Method(
            name,
            function,
            aliases,
            paper,
            count,
            base_is_source,
            prepare,
            survey,
            kept,
            copies,
            check,
            any_array,
            frozenset(positional),
            variant,
            learns,
            searches,
            prepare_uses,
            whole,
            gathers,
            averages_base,
        )
        _ = method.parameters  # a signature that cannot be read fails here, at import
        _BY_FUNCTION[function] = method
        for key in (name, *aliases) if listed else ():
            if key in _METHODS and _METHODS[key].function.__module__ != function.__module__:
                owner = _METHODS[key].function.__module__
                raise TypeError(f"merge method '{key}' is already defined by {owner}")
            _METHODS[key] = method
        return function

    return record


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
    ours = {name: i for i, name in enumerate(_BUILT_IN)}

    def place(method: Method) -> tuple[int, str]:
        module = method.function.__module__.removeprefix("merge_cli.methods.")
        return ours.get(module, len(ours)), method.name

    order = sorted(unique.values(), key=place)
    return order


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
        except Exception as error:
            # A broken plugin must not look like a missing method: say which package it is.
            package = entry.dist.name if entry.dist else entry.value
            message = f"the plugin '{entry.name}' of package '{package}' failed to load: {error!r}"
            raise UsageError(message, hint=f"Fix or uninstall '{package}'.") from error
