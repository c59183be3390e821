"""The numbers that optimizers are told: finite ones, also for what has no score.

The order is: scores, candidates that were ruled out on a share of the rows, candidates that violate
a constraint, candidates that failed. The penalties are multiples of the largest score so far, so
that they never overlap with scores.
"""

from __future__ import annotations

from merge_cli.evolve.objectives import CandidateScore

_REJECTED, _VIOLATED, _FAILED = 1e3, 1e6, 1e9
Rank = tuple[float, tuple[float, ...]]  # rank, and each goal's part


class Ranking:
    """Ranks for `tell`, from scores in the order of the search; remembers the largest score.

    Args:
        goals: number of parts of a score.
    """

    def __init__(self, goals: int) -> None:
        self._goals, self._size = goals, 1.0

    def see(self, score: CandidateScore) -> None:
        """Take note of a score; of a generation all scores before the first `of`."""
        self._size = max(self._size, abs(score.total), *map(abs, score.parts))

    def failed(self) -> Rank:
        worst = _FAILED * self._size
        return worst, (worst,) * self._goals

    def of(self, score: CandidateScore, rejections: int = 0) -> Rank:
        """Rank and parts of a candidate.

        Args:
            rejections: stages that it did not reach; 0 for a candidate with all rows.
        """
        penalty = _REJECTED * rejections * self._size
        if score.violation:
            # At most one multiple, so that failed candidates still come after it.
            share = score.violation / (1.0 + score.violation)
            penalty += _VIOLATED * (1.0 + share) * self._size
            return penalty, tuple(part + penalty for part in score.parts)
        return penalty + score.total, tuple(part + penalty for part in score.parts)
