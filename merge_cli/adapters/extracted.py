"""What an extraction has made: how much of each change the adapter holds, and why not more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModuleChange:
    """How much of one tensor's change the adapter holds.

    Attributes:
        squares: the sum of squares of the change.
        share: the part of it that the adapter holds.
        rank: of its factors; None where the tensor is saved in full (1.0) or left out (0.0).
        why: the reason for leaving it out.
    """

    name: str
    squares: float
    share: float
    rank: int | None = None
    why: str = ""

    def with_why(self, why: str) -> ModuleChange:
        """The same, left out for a reason; as it is where there is none."""
        return replace(self, share=0.0, why=why) if why else self


def changes_left_out(changes: Sequence[ModuleChange]) -> dict[str, tuple[int, float]]:
    """By reason, how many tensors are left out, and their share of the complete change."""
    total = sum(change.squares for change in changes)
    by_reason: dict[str, tuple[int, float]] = {}
    for change in changes:
        if change.why:
            count, share = by_reason.get(change.why, (0, 0.0))
            by_reason[change.why] = (count + 1, share + change.squares / total)
    return by_reason


@dataclass(frozen=True)
class ExtractedAdapter:
    """A finished adapter.

    Attributes:
        bytes: of its weights; `model_bytes` are those of the fine-tune.
        changes: of every tensor that has changed.
    """

    path: Path
    bytes: int
    model_bytes: int
    changes: tuple[ModuleChange, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The part of the complete change's sum of squares that the adapter holds."""
        total = sum(change.squares for change in self.changes)
        held = sum(change.share * change.squares for change in self.changes)
        return held / total if total else 1.0

    def left_out(self) -> dict[str, tuple[int, float]]:
        """See `changes_left_out`."""
        return changes_left_out(self.changes)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "model_bytes": self.model_bytes,
            "share": self.share,
            "notes": list(self.notes),
            "changes": [
                {
                    "name": c.name,
                    "squares": c.squares,
                    "share": c.share,
                    "rank": c.rank,
                    **({"why": c.why} if c.why else {}),
                }
                for c in self.changes
            ],
        }
