"""Two cases like the paper's: a language and two kinds of maths; three unlike domains.

python scripts/experiments/paper_cases.py [--seeds 0 1 2]   about 10 minutes after training
"""

from __future__ import annotations

from collections.abc import Sequence

from drawing import quality_over
from family import Expert, model
from lab import Case, keep, main, markdown, of, publish, run_case, spread

METHODS = ("uniform soup", "task arithmetic", "ties", "dare")
CASES = {
    "a language and two maths experts": ("japanese", "math", "math-b"),
    "three unlike domains": ("english", "german", "math"),
}


def case(name: str, seed: int) -> Case:
    experts = {domain: model(Expert(domain, seed)) for domain in CASES[name]}
    # Both maths experts answer the same problems: one domain, whose own expert is the better one's
    # recipe of training, as in the zoo.
    domains = {domain: domain for domain in experts if domain != "math-b"}
    return Case(f"paper-{len(domains)}-{seed}", experts, domains)


def run(seeds: Sequence[int]) -> None:
    results = {name: [run_case(case(name, seed)) for seed in seeds] for name in CASES}
    keep(
        "paper_cases",
        [one for found in results.values() for one in found],
        "python scripts/experiments/paper_cases.py",
    )
    tables = []
    for name, found in results.items():
        domains = [task["name"] for task in found[0]["tasks"]]
        rows = [
            [
                model_name,
                *(
                    spread([of(one, model_name)["scores"][d]["value"] for one in found])
                    for d in domains
                ),
                spread([of(one, model_name)["normalised_mean"]["value"] for one in found], 2),
            ]
            for model_name in ("base", *CASES[name], *METHODS)
        ]
        cosine = spread([one["alike"]["cosine"] for one in found], 2)
        heads = ["model", *(f"{domain} ↓" for domain in domains), "normalised ↑"]
        tables.append(f"**{name}** (mean cosine of δ: {cosine})\n\n{markdown(heads, rows)}")
    publish("paper_cases", "\n\n".join(tables))
    quality_over("paper_cases", "", results, METHODS, [n.replace(" and ", "\nand ") for n in CASES])


if __name__ == "__main__":
    main(run, __doc__ or "")
