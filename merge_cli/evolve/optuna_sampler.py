"""Optuna's samplers as optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.errors import ResourceError
from merge_cli.evolve.optimizer import EvaluatedGenome, Genomes, batch_size
from merge_cli.evolve.space import Space
from merge_cli.recipe.search import Search

_HINT = "pip install 'merge-cli[evolve]'"


class OptunaSampler:
    """Optuna's TPE (one goal) and NSGA-II (several goals)."""

    def __init__(
        self,
        search: Search,
        space: Space,
        population: int,
        seed: int,
        start: list[float] | None,
        goals: int,
        evaluated: Sequence[EvaluatedGenome] = (),
    ) -> None:
        kind = search.optimizer
        try:
            import optuna
        except ImportError:
            raise ResourceError(f"{kind} needs the package optuna", hint=_HINT) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._several = kind == "nsga2"
        sampler: Any = (
            optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
            if self._several
            # With a constant liar, candidates that are being evaluated count as bad ones.
            else optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=population,
                constant_liar=search.workers > 1 or batch_size(search, population) > 1,
            )
        )
        self._study = optuna.create_study(
            sampler=sampler, directions=["minimize"] * (goals if self._several else 1)
        )
        self._choices = [len(gene.searched.choices) for gene in space.genes]
        self._space: dict[str, Any] = {
            f"{i:05d}": optuna.distributions.CategoricalDistribution(list(range(choices)))
            if choices
            else optuna.distributions.FloatDistribution(0.0, 1.0)
            for i, choices in enumerate(self._choices)
        }
        for item in evaluated:
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=self._params(item.genome),
                    distributions=self._space,
                    **({"values": list(item.parts)} if self._several else {"value": item.rank}),
                )
            )
        if start is not None:
            self._study.enqueue_trial(self._params(start))
        self._trials: list[Any] = []
        self._pending: list[tuple[list[float], Any]] = []
        self.population, self.ended = batch_size(search, population), ""

    def ask(self) -> Genomes:
        self._trials = [self._study.ask(self._space) for _ in range(self.population)]
        return [self._genome(trial) for trial in self._trials]

    def ask_one(self) -> list[float]:
        trial = self._study.ask(self._space)
        genome = self._genome(trial)
        self._pending.append((genome, trial))
        return genome

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        index = next(i for i, (pending, _) in enumerate(self._pending) if pending == genome)
        _, trial = self._pending.pop(index)
        self._study.tell(trial, list(parts) if self._several else rank)

    def _params(self, genome: Sequence[float]) -> dict[str, Any]:
        return {
            name: min(int(u * choices), choices - 1) if choices else u
            for name, u, choices in zip(self._space, genome, self._choices, strict=True)
        }

    def _genome(self, trial: Any) -> list[float]:
        return [
            (trial.params[name] + 0.5) / choices if choices else float(trial.params[name])
            for name, choices in zip(self._space, self._choices, strict=True)
        ]

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        # A last generation may be smaller than the proposed one.
        results = zip(self._trials, ranks, parts, strict=False)
        for trial, rank, goals in results:
            self._study.tell(trial, list(goals) if self._several else rank)
