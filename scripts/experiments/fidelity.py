"""What cheaper evaluations do to a search: `fidelity: [0.25]` off and on, on the model family.

    python scripts/experiments/fidelity.py            # about 45 minutes on one idle core
    python scripts/experiments/fidelity.py --report   # the tables again

1. Random search proposes the same candidates whatever it is told. So one search off and one on
   show, candidate by candidate, what a quarter of the rows rules out that all would have kept.
2. CMA-ES off, on with as many candidates, and on with as many tokens (each of 110 candidates costs
   a quarter, and half of them the whole, where each of 100 costs the whole).

Task arithmetic of the japanese, math and code experts, as in evolve.py. Writes
docs/experiments/fidelity.json and the tables in fidelity.md; what is finished is kept in --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evolve import DOCS, ROOT, SEEDS, search

ON = {"fidelity": [0.25], "keep": 0.5}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "CMA-ES, all rows": (100, {}),
    "CMA-ES, a quarter first": (100, ON),
    "CMA-ES, a quarter first, as many tokens": (110, ON),
}
RANDOM = {"off": {"optimizer": "random"}, "on": {"optimizer": "random", **ON}}


def run_all(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"random": {}, "ways": {}}
    for seed in SEEDS:
        found["random"][str(seed)] = {
            name: search("task_arithmetic", seed, 100, work, f"-random-{name}", **section)
            for name, section in RANDOM.items()
        }
        for number, (way, (evaluations, section)) in enumerate(WAYS.items()):
            runs = found["ways"].setdefault(way, {})
            runs[str(seed)] = search(
                "task_arithmetic", seed, evaluations, work, f"-{number}", **section
            )
    for runs in found["ways"].values():
        for run in runs.values():
            del run["history"], run["best_after"]
    return found


def ruled_out(pair: Mapping[str, Any]) -> dict[str, Any]:
    """What the quarter of the rows rejected, by what all rows say of it."""
    whole = [one["score"] for one in pair["off"]["history"]]
    kept = [one["share"] == 1.0 for one in pair["on"]["history"]]
    best = min(whole)
    place = whole.index(best)
    return {
        "rejected": kept.count(False),
        "best_kept": kept[place],
        "lost": min(s for s, k in zip(whole, kept, strict=True) if k) - best,
        "wrong": mean(
            s < sorted(whole)[len(whole) // 2] for s, k in zip(whole, kept, strict=True) if not k
        ),
    }


def tables(found: Mapping[str, Any]) -> str:
    lines = [
        "| random search, seed | rejected of 100 | of these, in the better half on all rows | "
        "the best was kept | lost by it, nats |",
        "|---|---:|---:|---|---:|",
    ]
    for seed, pair in found["random"].items():
        one = ruled_out(pair)
        lines.append(
            f"| {seed} | {one['rejected']} | {one['wrong']:.0%} "
            f"| {'yes' if one['best_kept'] else 'no'} | {one['lost']:.4f} |"
        )
    lines += [
        "",
        "| search | candidates | tokens | seconds | best, validation rows | the same, test rows |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, runs in found["ways"].items():
        costs = [run["cost"] for run in runs.values()]
        scores = [_spread([run[kind] for run in runs.values()]) for kind in ("search", "test")]
        lines.append(
            f"| {way} | {costs[0]['evaluations']} | {mean(c['tokens'] for c in costs):,.0f} "
            f"| {mean(c['seconds'] for c in costs):.0f} | {' | '.join(scores)} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "fidelity")
    parser.add_argument("--report", action="store_true", help="write the tables again")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    place = DOCS / "fidelity.json"
    if not args.report:
        place.write_text(json.dumps(run_all(args.work), indent=1) + "\n", encoding="utf-8")
    shown = tables(json.loads(place.read_text(encoding="utf-8")))
    page = DOCS / "fidelity.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- results -->")
    _, _, tail = rest.partition("<!-- end of results -->")
    text = f"{head}<!-- results -->\n{shown}\n<!-- end of results -->{tail}"
    page.write_text(text, encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()
