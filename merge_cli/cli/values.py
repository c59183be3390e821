"""Values of the command line that nothing has to check.

typer checks every value with pydantic, also one that is not given. Importing pydantic and
describing thirty options to it takes longer than a small merge: only what may be wrong goes there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_UNCHECKED = object()


def spare_checks(parameter: Any) -> None:
    """Let a parameter of a command take values that cannot be wrong as they are."""
    if "process_value" in vars(parameter):
        return  # done before
    check = parameter.process_value
    # The type that is declared; versions of typer without pydantic do not say it here.
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)

    def process_value(context: Any, value: Any) -> Any:
        result = _as_it_is(parameter, kind, value)
        if result is _UNCHECKED:
            return check(context, value)
        return parameter.callback(context, parameter, result) if parameter.callback else result

    parameter.process_value = process_value


def _as_it_is(parameter: Any, kind: Any, value: Any) -> Any:
    """What typer would make of a value, where that is plain."""
    if value is None and not parameter.required:
        return () if getattr(parameter, "multiple", False) or parameter.nargs == -1 else None
    if kind in (str, int, bool) and type(value) is kind:  # a text, or a default of ours
        return value
    if kind is Path and type(value) is str and not os.path.lexists(value):
        return Path(value)  # of one that exists typer asks whether it can be read
    return _UNCHECKED
