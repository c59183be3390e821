"""How much each parameter mattered, as far as the candidates that were tried can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CANDIDATES = 10  # for each number, at least, before importance is told


def importance(genomes: Sequence[Sequence[float]], scores: Sequence[float]) -> list[float]:
    """For each number of a genome, the share of the scores' variance that it explains alone.

    A parabola in ranks: what has its best value in the middle counts, too. Ranks, because a few
    very bad candidates would otherwise be all the variance there is. The share is adjusted for the
    two coefficients (0 is chance), and says nothing of interactions.

    Returns:
        one share of 0 to 1 each; zeros where fewer than ten candidates for each number have a
        score: then chance explains as much.
    """
    import numpy as np

    if not genomes or len(scores) < _CANDIDATES * len(genomes[0]) or len(set(scores)) < 2:
        return [0.0] * (len(genomes[0]) if genomes else 0)
    y = _ranks(np.array(scores))
    variance = float(((y - y.mean()) ** 2).sum())
    result = []
    for column in np.array(genomes).T:
        x = _ranks(column)
        terms = np.stack([np.ones_like(x), x, x * x], axis=1)
        solution = np.linalg.lstsq(terms, y, rcond=None)[0]
        left = float(((y - terms @ solution) ** 2).sum())
        count = len(y)
        adjusted = 1 - (left / (count - 3)) / (variance / (count - 1))
        result.append(round(min(max(adjusted, 0.0), 1.0), 4))
    return result


def _ranks(values: Any) -> Any:
    """Ranks from -1 to 1; equal values share their mean rank."""
    import numpy as np

    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts + 1) / 2)[inverse]
    return ranks / max(len(ranks) - 1, 1) * 2 - 1
