"""Byte sizes as people write them: 5GB, 512MB, 4GiB, 1.5G."""

from __future__ import annotations

import re

from merge_cli.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, flag: str) -> int:
    """Bytes.

    Raises:
        UsageError: not a size; shows the forms that are.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{flag}: '{text}' is not a size", hint="Write it like 5GB or 512MiB.")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_UNITS.get(unit) or _BINARY[unit]))


def show_size(size: float) -> str:
    """Three digits and a unit: 9.96 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def show_seconds(seconds: float) -> str:
    """0.42 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
