"""A search's optimizers on a quadratic of 12 numbers, beside the libraries that they are made of.

    python scripts/experiments/quadratic.py    # a minute on one core

48 evaluations of the mean of (u - bottom)², the bottom drawn by the seed; 20 seeds. The product's
have `start: middle`; "alone" is the library with its defaults. Optuna's CmaEsSampler is measured
where its package `cmaes` is installed, with the same start, step and population as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
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
    from merge_cli.evolve.optuna_sampler import OptunaSampler
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


def our_cma(seed: int) -> float:
    """The best value that the product's CMA-ES reaches."""
    from merge_cli.evolve.cma_es import CMAES
    from merge_cli.evolve.space import default_population
    from merge_cli.recipe.search import Search

    optimizer = CMAES(Search(), NUMBERS, default_population(NUMBERS), seed, [0.5] * NUMBERS)
    value, values = objective(seed), []
    while len(values) < EVALUATIONS:
        genomes = optimizer.ask()
        scores = [value(genome) for genome in genomes]
        optimizer.tell(genomes, scores, [(score,) for score in scores])
        values += scores
    return min(values[:EVALUATIONS])


def pycma_alone(seed: int) -> float:
    """The best value that pycma reaches, with the same start and step."""
    import cma

    es = cma.CMAEvolutionStrategy(
        [0.5] * NUMBERS, 1 / 6, {"bounds": [0, 1], "seed": seed + 1, "verbose": -9}
    )
    value, values = objective(seed), []
    while len(values) < EVALUATIONS:
        genomes = es.ask()
        scores = [value(genome) for genome in genomes]
        es.tell(genomes, scores)
        values += scores
    return float(min(values[:EVALUATIONS]))


def optuna_cma(seed: int) -> float:
    """The best value that Optuna's CmaEsSampler reaches, with our start, step and population."""
    import optuna

    from merge_cli.evolve.space import default_population

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    value = objective(seed)
    names = [f"u{i:02d}" for i in range(NUMBERS)]
    sampler = optuna.samplers.CmaEsSampler(
        x0=dict.fromkeys(names, 0.5),
        sigma0=1 / 6,
        popsize=default_population(NUMBERS),
        n_startup_trials=0,
        seed=seed,
        warn_independent_sampling=False,
    )
    study = optuna.create_study(sampler=sampler)
    study.optimize(
        lambda trial: value([trial.suggest_float(name, 0, 1) for name in names]),
        n_trials=EVALUATIONS,
    )
    return float(study.best_value)


def random_search(seed: int) -> float:
    """The best value of independent random samples."""
    from merge_cli.evolve.optimizers import RandomSearch

    # Another seed than the bottom's, which comes from the same generator.
    search = RandomSearch(NUMBERS, EVALUATIONS, seed + 1000, [0.5] * NUMBERS)
    value = objective(seed)
    return min(value(genome) for genome in search.ask())


WAYS: dict[str, Callable[[int], float]] = {
    "a generation at a time, constant liar": lambda seed: ours(seed, workers=11),
    "one by one (one worker)": ours,
    "four workers, constant liar": lambda seed: ours(seed, workers=4),
    "Optuna alone": optuna_alone,
    "CMA-ES, the product's": our_cma,
    "CMA-ES, pycma alone": pycma_alone,
    "CMA-ES, Optuna's": optuna_cma,
    "random": random_search,
}


def main() -> None:
    print("| 12 numbers, 48 evaluations | best, mean of 20 seeds | standard error |")
    print("|---|---:|---:|")
    for name, way in WAYS.items():
        if way is optuna_cma and find_spec("cmaes") is None:
            continue
        values = [way(seed) for seed in range(SEEDS)]
        print(f"| {name} | {mean(values):.4f} | {stdev(values) / SEEDS**0.5:.4f} |", flush=True)


if __name__ == "__main__":
    main()
