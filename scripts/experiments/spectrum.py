"""The spectrum: soup, task arithmetic, TIES, DARE on three domains, quality against cost.

python scripts/experiments/spectrum.py [--seeds 0 1 2]      about 8 minutes after training
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from drawing import quality_against_cost
from family import Expert, model
from lab import Case, keep, main, markdown, of, publish, run_case, spread

DOMAINS = ("japanese", "math", "german")
METHODS = ("uniform soup", "task arithmetic 0.4", "task arithmetic", "ties", "dare")


def case(seed: int) -> Case:
    experts = {domain: model(Expert(domain, seed)) for domain in DOMAINS}
    return Case(f"spectrum-{seed}", experts, {domain: domain for domain in DOMAINS})


def run(seeds: Sequence[int]) -> None:
    results = [run_case(case(seed)) for seed in seeds]
    keep("spectrum", results, "python scripts/experiments/spectrum.py")
    rows = []
    for name in ("base", *DOMAINS, *METHODS):
        found = [of(result, name) for result in results]
        cells = [spread([one["scores"][domain]["value"] for one in found]) for domain in DOMAINS]
        cells.append(spread([one["normalised_mean"]["value"] for one in found], 2))
        cost = [one["cost"]["seconds"] for one in found if one["cost"]]
        cells.append(f"{mean(cost):.1f} s" if cost else "–")
        choosing = [r["choosing"][name] for r in results if name in r["choosing"]]
        cells.append(
            f"{choosing[0]['merges']} merges, {mean(c['tokens'] for c in choosing):,.0f} tokens, "
            f"{mean(c['seconds'] for c in choosing):.0f} s"
            if choosing
            else "–"
        )
        rows.append([name, *cells])
    heads = [
        "model",
        *(f"{domain} ↓" for domain in DOMAINS),
        "normalised ↑",
        "time",
        "choosing settings",
    ]
    chosen = "; ".join(
        f"seed {seed}: "
        + ", ".join(
            f"{method} " + " ".join(f"{k} {v:g}" for k, v in settings.items())
            for method, settings in result["chosen"].items()
        )
        for seed, result in zip(seeds, results, strict=True)
    )
    publish("spectrum", markdown(heads, rows) + f"\n\nChosen on validation text: {chosen}.")
    quality_against_cost("spectrum", results, METHODS)


if __name__ == "__main__":
    main(run, __doc__ or "")
