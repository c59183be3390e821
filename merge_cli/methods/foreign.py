"""Functions of methods from other packages, as the engine calls them.

One that ends the program (`sys.exit`) would end a merge as if it were finished. Here that is an
error of the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from merge_cli.errors import UsageError

OURS = "merge_cli."


@dataclass(frozen=True)
class ForeignFunction:
    """A function of another package's method.

    Attributes:
        function: it.
        method: the method's name.
    """

    function: Callable[..., Any]
    method: str

    def __call__(self, *values: Any, **options: Any) -> Any:
        """Call it.

        Raises:
            UsageError: it ends the program.
        """
        try:
            return self.function(*values, **options)
        except SystemExit as error:
            message = f"the method '{self.method}' ends the program: SystemExit({error.code!r})"
            where = f"{defined_in(self.function)}.{getattr(self.function, '__name__', '')}"
            hint = "Its package has to raise an error instead."
            raise UsageError(message, where=where, hint=hint) from error

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What `inspect` reads the signature and the docstring of."""
        return self.function


def guarded(method: Any, name: str) -> dict[str, Any]:
    """The functions among a method's fields, each as a `ForeignFunction`.

    Args:
        method: a dataclass.
        name: the method's.
    """
    functions = {f.name: getattr(method, f.name) for f in fields(method)}
    return {key: ForeignFunction(f, name) for key, f in functions.items() if callable(f)}


def defined_in(function: Callable[..., Any]) -> str:
    """The module that a function is from."""
    return str(getattr(inspect.unwrap(function), "__module__", ""))
