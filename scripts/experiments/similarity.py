"""Similarity: experts trained for more and more steps; where does averaging stop competing?

python scripts/experiments/similarity.py [--seeds 0 1 2]    about 20 minutes after training
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from drawing import quality_over
from family import STEPS, Expert, model
from lab import Case, keep, main, markdown, of, publish, run_case, spread

DOMAINS = ("japanese", "math", "german")
METHODS = ("uniform soup", "task arithmetic", "ties", "dare")


def case(steps: int, seed: int) -> Case:
    experts = {domain: model(Expert(domain, seed, steps)) for domain in DOMAINS}
    return Case(f"similarity-{steps}-{seed}", experts, {domain: domain for domain in DOMAINS})


def run(seeds: Sequence[int]) -> None:
    results = {steps: [run_case(case(steps, seed)) for seed in seeds] for steps in STEPS}
    keep(
        "similarity",
        [one for found in results.values() for one in found],
        "python scripts/experiments/similarity.py",
    )
    rows = []
    for steps, found in results.items():
        alike = [one["alike"] for one in found]
        gained = mean(
            of(one, "base")["scores"][d]["value"] - of(one, d)["scores"][d]["value"]
            for one in found
            for d in DOMAINS
        )
        rows.append(
            [
                str(steps),
                spread([one["cosine"] for one in alike]),
                spread([100 * one["relative_norm"] for one in alike], 1),
                f"{gained:.3f}",
                *(
                    spread([of(one, m)["normalised_mean"]["value"] for one in found], 2)
                    for m in METHODS
                ),
            ]
        )
    heads = ["steps", "mean cosine of δ", "‖δ‖/‖θ₀‖ in %", "expert's gain, nats", *METHODS]
    publish("similarity", markdown(heads, rows))
    cosines = {
        steps: mean(one["alike"]["cosine"] for one in found) for steps, found in results.items()
    }
    quality_over(
        "similarity",
        "training steps of each expert (δ cosine)",
        results,
        METHODS,
        [f"{steps}\n({cosines[steps]:.2f})" for steps in results],
    )


if __name__ == "__main__":
    main(run, __doc__ or "")
