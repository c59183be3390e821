"""TPE on a quadratic of 12 numbers: in generations, one by one, and Optuna alone.

    python scripts/experiments/quadratic.py    # a minute on one core

48 evaluations of the mean of (u - bottom)², the bottom drawn by the seed; 20 seeds. "Optuna alone"
is its TPESampler with its defaults and no start; the others have `start: middle`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

NUMBERS, EVALUATIONS, SEEDS = 12, 48, 20


def objective(seed: int) -> Callable[[list[float]], float]:
    """The mean squared distance from a point that the seed draws."""
    import numpy as np

    bottom = np.random.default_rng(seed).uniform(0.1, 0.9, NUMBERS)
    return lambda genome: float(((np.array(genome) - bottom) ** 2).mean())


def ours(seed: int, **section: Any) -> float:
    """The best value that the product's TPE reaches."""
    from merge_cli.evolve.optimizers import OptunaSampler
    from merge_cli.evolve.space import Gene, default_population
    from merge_cli.recipe.search import Search, SearchedParameter

    class Numbers:
        genes = tuple(Gene(SearchedParameter(f"u{i}")) for i in range(NUMBERS))

    search = Search(optimizer="tpe", **section)
    population = default_population(NUMBERS)
    space: Any = Numbers()
    optimizer = OptunaSampler(search, space, population, seed, [0.5] * NUMBERS, 1)
    value, values = objective(seed), []
    while len(values) < EVALUATIONS:
        genomes = optimizer.ask()
        scores = [value(genome) for genome in genomes]
        optimizer.tell(genomes, scores, [(score,) for score in scores])
        values += scores
    return min(values[:EVALUATIONS])


def optuna_alone(seed: int) -> float:
    """The best value that Optuna's defaults reach."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    value = objective(seed)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(
        lambda trial: value([trial.suggest_float(f"u{i}", 0, 1) for i in range(NUMBERS)]),
        n_trials=EVALUATIONS,
    )
    return float(study.best_value)


WAYS: dict[str, Callable[[int], float]] = {
    "a generation at a time, constant liar": lambda seed: ours(seed, workers=11),
    "one by one (one worker)": ours,
    "four workers, constant liar": lambda seed: ours(seed, workers=4),
    "Optuna alone": optuna_alone,
}


def main() -> None:
    print("| TPE, 12 numbers, 48 evaluations | best, mean of 20 seeds | standard error |")
    print("|---|---:|---:|")
    for name, way in WAYS.items():
        values = [way(seed) for seed in range(SEEDS)]
        print(f"| {name} | {mean(values):.4f} | {stdev(values) / SEEDS**0.5:.4f} |", flush=True)


if __name__ == "__main__":
    main()
