"""What an optimizer is told instead of a score, where a candidate has none or breaks a constraint.

In this order: scores, candidates that a smaller share of the rows has ruled out, those that break a
constraint, those that failed. The numbers keep clear of the scores, whatever their size: they are
multiples of the largest one seen.
"""

from __future__ import annotations

from merge_cli.evolve.objectives import CandidateScore

_REJECTED, _VIOLATED, _FAILED = 1e3, 1e6, 1e9
Told = tuple[float, tuple[float, ...]]  # rank, and each goal's part


class Ranking:
    """Remembers how large scores are. A function of what it was shown, in order.

    Args:
        goals: how many parts a score has.
    """

    def __init__(self, goals: int) -> None:
        self._goals, self._size = goals, 1.0

    def see(self, score: CandidateScore) -> None:
        """Scores of a generation, before any of them is told."""
        self._size = max(self._size, abs(score.total), *map(abs, score.parts))

    def failed(self) -> Told:
        worst = _FAILED * self._size
        return worst, (worst,) * self._goals

    def of(self, score: CandidateScore, rejections: int = 0) -> Told:
        """Rank and parts.

        Args:
            rejections: stages that it was not let into; 0 for one with all rows.
        """
        penalty = _REJECTED * rejections * self._size
        if score.violation:
            # Within one multiple, so that the order by violation leaves what comes behind alone.
            share = score.violation / (1.0 + score.violation)
            penalty += _VIOLATED * (1.0 + share) * self._size
            return penalty, tuple(part + penalty for part in score.parts)
        return penalty + score.total, tuple(part + penalty for part in score.parts)
