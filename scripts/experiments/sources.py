"""Number of sources: two, three and four experts in one model.

python scripts/experiments/sources.py [--seeds 0 1 2]       about 11 minutes after training
"""

from __future__ import annotations

from collections.abc import Sequence

from drawing import quality_over
from family import Expert, model
from lab import GRIDS, Case, keep, main, markdown, of, publish, run_case, spread

DOMAINS = ("japanese", "math", "german", "english")
METHODS = ("uniform soup", "task arithmetic", "ties", "dare")


def case(count: int, seed: int) -> Case:
    experts = {domain: model(Expert(domain, seed)) for domain in DOMAINS[:count]}
    return Case(f"sources-{count}-{seed}", experts, {domain: domain for domain in experts})


def run(seeds: Sequence[int]) -> None:
    results = {}
    for count in range(2, len(DOMAINS) + 1):
        # Between two models there is also the great circle.
        circle = {"slerp": [{"merge_method": "slerp", "parameters": {"t": 0.5}}]}
        grids = {**GRIDS, **circle} if count == 2 else GRIDS
        results[count] = [run_case(case(count, seed), grids) for seed in seeds]
    keep(
        "sources",
        [one for found in results.values() for one in found],
        "python scripts/experiments/sources.py",
    )
    rows = []
    for count, found in results.items():
        cells = [
            spread([of(one, method)["normalised_mean"]["value"] for one in found], 2)
            for method in METHODS
        ]
        circle_cell = "–"
        if count == 2:
            circle_cell = spread([of(one, "slerp")["normalised_mean"]["value"] for one in found], 2)
        rows.append([f"{count}: {', '.join(DOMAINS[:count])}", *cells, circle_cell])
    publish("sources", markdown(["sources", *METHODS, "slerp"], rows))
    quality_over("sources", "number of experts", results, METHODS, [str(c) for c in results])


if __name__ == "__main__":
    main(run, __doc__ or "")
