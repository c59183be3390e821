"""What cheaper evaluations do to a search: `fidelity: [0.25]` off and on, on the model family.

    python scripts/experiments/fidelity.py            # about 45 minutes on one idle core
    python scripts/experiments/fidelity.py --report   # the tables again

1. Random search proposes the same candidates whatever it is told. So one search off and one on
   show, candidate by candidate, what a quarter of the rows rules out that all would have kept.
2. CMA-ES off, on with as many candidates, and on with as many tokens (each of 110 candidates costs
   a quarter, and half of them the whole, where each of 100 costs the whole).

Task arithmetic of the japanese, math and code experts, a weight for each. Writes
docs/experiments/fidelity.json and the tables in fidelity.md; what is finished is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from family import ROOT

ZOO, DOCS = ROOT / "zoo", ROOT / "docs" / "experiments"
EXPERTS, SEEDS = ("japanese", "math", "code"), (0, 1, 2)
ROWS = {
    "val": {"japanese": 3, "math": 30, "code": 3},
    "test": {"japanese": 12, "math": 120, "code": 12},
}
LENGTH = 128

ON = {"fidelity": [0.25], "keep": 0.5}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "CMA-ES, all rows": (100, {}),
    "CMA-ES, a quarter first": (100, ON),
    "CMA-ES, a quarter first, as many tokens": (110, ON),
}
RANDOM = {"off": {"optimizer": "random"}, "on": {"optimizer": "random", **ON}}


def tasks(split: str, word: str) -> list[dict[str, Any]]:
    """The loss of each domain, as an objective lists it."""
    return [
        {
            "task": "loss",
            "data": str(ZOO / "data" / f"{domain}.{split}.jsonl"),
            "limit": rows,
            "split": word,
        }
        for domain, rows in ROWS[split].items()
    ]


def search(seed: int, evaluations: int, work: Path, label: str, **more: Any) -> dict[str, Any]:
    """One search by the command line, and what its report says.

    Args:
        label, more: another search section, and its name.
    """
    out = work / f"task_arithmetic-{seed}-{evaluations}{label}"
    if not out.exists():
        recipe = out.with_suffix(".yaml")
        section = {
            "method": "task_arithmetic",
            "parameters": {"weight": {"min": 0.0, "max": 1.2}},
            "evaluations": evaluations,
            **more,
        }
        objective = {
            "max_length": LENGTH,
            "seed": seed,
            "tasks": [*tasks("val", "search"), *tasks("test", "test")],
        }
        document = {
            "merge_method": "evolutionary",
            "base_model": str(ZOO / "base"),
            "models": [{"model": str(ZOO / expert)} for expert in EXPERTS],
            "dtype": "bfloat16",
            "seed": seed,
            "search": section,
            "objective": objective,
        }
        recipe.write_text(yaml.safe_dump(document))
        command = [sys.executable, "-m", "merge_cli", "run", str(recipe), str(out), "--quiet"]
        command += ["--device", "cpu", "--threads", "1"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))["search"]
    return {
        "search": found["best"]["score"],
        "first": found["history"][0]["score"],
        "test": found["scores"]["found"]["score"],
        "static": {
            Path(name).name if "/" in name else name: one["score"]
            for name, one in found["scores"].items()
        },
        "best_after": [one["best"] for one in found["history"]],
        "values": found["best"]["values"],
        "history": [{"score": one["score"], "share": one["share"]} for one in found["history"]],
        "cost": found["cost"],
    }


def run_all(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"random": {}, "ways": {}}
    for seed in SEEDS:
        found["random"][str(seed)] = {
            name: search(seed, 100, work, f"-random-{name}", **section)
            for name, section in RANDOM.items()
        }
        for number, (way, (evaluations, section)) in enumerate(WAYS.items()):
            runs = found["ways"].setdefault(way, {})
            runs[str(seed)] = search(seed, evaluations, work, f"-{number}", **section)
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
