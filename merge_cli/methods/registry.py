"""Which methods there are. `@merge_method` records a function and hands it back untouched.

Packages add methods by the entry-point group `merge_cli.methods`: docs/writing_a_method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from merge_cli.errors import UsageError
from merge_cli.kernels.fused import FusedForm
from merge_cli.methods.foreign import OURS, guarded
from merge_cli.methods.former_keywords import renamed
from merge_cli.methods.method import SUPPLIED, Method, positional
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
        unknown = set(positional(function)) - set(SUPPLIED)
        if unknown:
            raise TypeError(f"{name}: the engine supplies {SUPPLIED}, not {sorted(unknown)}")
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


def get_method(name: str) -> Method:
    """The method of that name or alias.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name in _BUILT_IN:
        _load_one(name)  # most recipes need one module of ours, and no plugin
    if name not in _METHODS:
        _load_built_in()
    if name not in _METHODS:
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
        _load_one(module)


@cache
def _load_one(module: str) -> None:
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
