"""Keywords of `merge_method` until 0.2, which packages with methods may still use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

_FORMER_KEYWORDS = {
    "prepare": "tensor_pass",
    "survey": "model_pass",
    "kept": "count_kept",
    "copies": "is_identity",
    "variant": "resolve_variant",
    "any_array": "supports_numpy",
    "whole": "extra_memory",
}
_DERIVED = ("learns", "prepare_uses")  # former keywords that follow from signatures now


def renamed(name: str, former: Mapping[str, Any]) -> dict[str, Any]:
    """Former keywords under the names that they have now, with a DeprecationWarning.

    Args:
        name: of the method.

    Raises:
        TypeError: a keyword that there has never been.
    """
    unknown = sorted(set(former) - set(_FORMER_KEYWORDS) - set(_DERIVED))
    if unknown:
        raise TypeError(f"{name}: merge_method() has no keyword '{unknown[0]}'")
    for keyword in former:
        now = _FORMER_KEYWORDS.get(keyword)
        advice = f"is called {now}" if now else "follows from signatures and can be left out"
        message = f"merge method '{name}': the keyword '{keyword}' {advice}"
        warnings.warn(message, DeprecationWarning, stacklevel=4)
    return {_FORMER_KEYWORDS[k]: value for k, value in former.items() if k in _FORMER_KEYWORDS}
