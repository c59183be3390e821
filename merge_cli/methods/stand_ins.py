"""Decorators of methods that stand for another one: nothing computes with them.

A search, a trial of several methods, or the reader of a recipe turns their recipes into recipes of
that other method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from merge_cli.methods.method import Method
from merge_cli.methods.registry import register

F = TypeVar("F", bound=Callable[..., Any])


def searched_method(name: str, *, paper: str) -> Callable[[F], F]:
    """Record a method that a search turns into a recipe of another one.

    The decorated function takes a recipe and returns that other method, or None where the recipe
    does not name it. Nothing computes with the method itself.
    """

    def record(function: F) -> F:
        method = Method(name, function, paper=paper, resolve_variant=function, searches=True)
        register(method)
        return function

    return record


def automatic_method(name: str) -> Callable[[F], F]:
    """Record a method that tries others on data, and becomes the best of them.

    The decorated function takes a recipe and returns the method that it is planned as.
    """

    def record(function: F) -> F:
        register(Method(name, function, resolve_variant=function, automatic=True))
        return function

    return record


def short_form(name: str, *, paper: str) -> Callable[[F], F]:
    """Record a method whose recipes are read into recipes of another one (`recipe.checkpoints`).

    The decorated function takes a recipe and returns that other method.
    """

    def record(function: F) -> F:
        method = Method(name, function, paper=paper, resolve_variant=function, is_short_form=True)
        register(method)
        return function

    return record
