"""What the core and each extra of merge-cli weigh, from what is installed here.

    python scripts/weigh_extras.py

Of an extra, what it installs beyond the core. Sizes are those of the files that packages list,
without caches of bytecode.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def requirements(name: str, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """What a distribution requires here, with extras."""
    found = set()
    for text in distribution(name).requires or ():
        needed = Requirement(text)
        environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if needed.marker is None or any(needed.marker.evaluate(e) for e in environments):
            found.add((key(needed.name), frozenset(needed.extras)))
    return found


def key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(start: set[tuple[str, frozenset[str]]]) -> tuple[set[str], set[str]]:
    """Every distribution that is needed, and those of them that are not installed here."""
    names: set[str] = set()
    absent: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(start)
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            waiting += requirements(*item)
            names.add(item[0])
        except PackageNotFoundError:
            absent.add(item[0])
    return names, absent


def size(name: str) -> int:
    """Bytes of a distribution's files."""
    files = distribution(name).files or ()
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    core, _ = closure(requirements("merge-cli", frozenset()))
    print(f"{'core':<14}{sum(map(size, core)) / 1e6:8.1f} MB  {len(core)} packages")
    for name in sorted(core, key=lambda n: -size(n))[:12]:
        print(f"    {name:<20}{size(name) / 1e6:8.1f} MB")
    for extra in sorted(distribution("merge-cli").metadata.get_all("Provides-Extra") or ()):
        needed, absent = closure(requirements("merge-cli", frozenset({extra})))
        more = needed - core - {"merge-cli"}
        note = f"; not installed here: {', '.join(sorted(absent))}" if absent else ""
        print(f"{extra:<14}{sum(map(size, more)) / 1e6:8.1f} MB  {len(more)} packages{note}")


if __name__ == "__main__":
    main()
