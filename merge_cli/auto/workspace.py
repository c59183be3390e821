"""OUT.auto: what has been tried so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge_cli.system.workspace import JournalWorkspace


class AutomaticWorkspace(JournalWorkspace):
    """OUT.auto: a journal with a line for each step that is done, and what dam has learned."""

    def __init__(self, target: Path, key: str, *, fresh: bool) -> None:
        super().__init__(target, ".auto", "automatic merge", key, fresh=fresh)

    def line(self, kind: str, step: str) -> dict[str, Any] | None:
        """The line of a step that is done."""
        lines = (line for line in self.lines if (line["kind"], line["step"]) == (kind, step))
        return next(lines, None)
