"""What proposes genomes by `ask` and `tell`.

An optimizer is seeded: the same sequence of `ask` and `tell` gives the same genomes bit for bit, so
that a journal is all the state that a search needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from merge_cli.recipe.search import Search

Genomes = list[list[float]]


@dataclass(frozen=True)
class EvaluatedGenome:
    """A genome with its result, as `Optimizer.tell` gets it."""

    genome: list[float]
    rank: float
    parts: tuple[float, ...]


class Optimizer(Protocol):
    """Proposes genomes.

    Attributes:
        population: number of genomes in the next generation.
        ended: why there are no more genomes; empty until then.
    """

    population: int
    ended: str

    def ask(self) -> Genomes:
        """The next generation."""

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        """The results of the genomes of `ask`.

        Args:
            ranks: one number for each, lower is better; finite, also for failures.
            parts: the goals of each, lower is better, for multi-objective optimizers.
        """

    def ask_one(self) -> list[float]:
        """One more genome, while others are still evaluated."""

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        """The result of a genome of `ask_one`; in any order."""


def batch_size(search: Search, population: int) -> int:
    """Candidates that are proposed before the optimizer gets their results.

    TPE proposes one for each worker: whatever it knows earlier makes the next proposal better.
    """
    by_one = search.optimizer == "tpe" and not search.fidelity
    return search.workers if by_one else population
