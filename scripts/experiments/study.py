"""All ways from averaging to automation, on two families of models, three seeds each.

    python scripts/experiments/study.py             # hours of CPU; stop it at any time
    python scripts/experiments/study.py --quick     # that everything runs: a few minutes
    python scripts/experiments/study.py --table     # tables and figures from study.json again

The seed is the recipes' own (which rows statistics and trainings see, their order, the search,
DARE's masks), and says which validation rows choose. The experts and the test rows are the same for
all seeds; test rows choose nothing. What needs neither rows nor chance runs once.

Every result is in docs/experiments/study.json as soon as it is measured, as losses by test row, and
is not measured again. Two processes may share the work (`--family`). Experts are in
.cache/experiments; merges are deleted when they have been measured.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from family import BASE, WORK
from study_families import FAMILIES, FULL, QUICK, Sizes, family_of
from study_methods import (
    DARE,
    TASK_ARITHMETIC,
    TIES,
    Context,
    Run,
    automatic,
    dam,
    existing,
    grid,
    soup,
    statistics,
    trained,
)
from study_page import BUDGETS, DOCS, ONCE, SEEDS, SOUP, publish
from study_training import KINDS, RATES, train

# In stages: what a stop leaves out is the end of this, not the last seed of everything.
STAGES: tuple[dict[str, Run], ...] = (
    {
        SOUP: soup,
        "base": existing(lambda _: BASE),
        **{f"expert {i + 1}": existing(lambda f, i=i: f.sources[i].folder) for i in range(3)},
        "task arithmetic": grid("task_arithmetic", TASK_ARITHMETIC),
        "TIES": grid("ties", TIES),
        "DARE": grid("dare", DARE),
        "Fisher": statistics("fisher"),
        "RegMean": statistics("regmean"),
        "DAM": dam("dam"),
    },
    {"auto": automatic("auto")},
    {
        "DAM from the soup": dam("dam-soup", start="soup", learning_rate=0.1),
        "search": automatic("search", ["search"]),
    },
    {kind: trained(kind) for kind in KINDS},
    *(
        {f"DAM, {size}": dam("dam-size", size), **{f"{k}, {size}": trained(k, size) for k in KINDS}}
        for size in BUDGETS
    ),
)


class Results:
    """study.json, which several processes may add to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"command": "python scripts/experiments/study.py", "rates": {}, "families": {}}
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def add(self, *values: tuple[Sequence[str], Any]) -> None:
        """Set values at their paths, whatever others have added meanwhile."""
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            document = self.read()
            for path, value in values:
                inner = document
                for key in path[:-1]:
                    inner = inner.setdefault(key, {})
                inner[path[-1]] = value
            staging = self.file.with_suffix(".partial")
            staging.write_text(_dumped(document), encoding="utf-8")
            staging.replace(self.file)
        finally:
            os.close(folder)  # the lock ends with it


def _dumped(document: Any) -> str:
    """JSON with a line for each run, so that it can be read and compared."""
    families = document["families"]
    lines = []
    for name, family in families.items():
        runs = [
            f"   {json.dumps(key)}: {json.dumps(run, ensure_ascii=False)}"
            for key, run in sorted(family["runs"].items())
        ]
        head = f'  "{name}": {{"weights": {json.dumps(family["weights"])}, "runs": {{\n'
        lines.append(head + ",\n".join(runs) + "\n  }}")
    rest = {key: value for key, value in document.items() if key != "families"}
    return (
        json.dumps(rest, ensure_ascii=False)[:-1]
        + ', "families": {\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


def order(families: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int, str, Run]]:
    """Everything of the first seed, then one stage after the other of the other seeds."""
    first, others = seeds[:1], seeds[1:]
    for group in (first, others):
        for stage in STAGES:
            for seed in group:
                for family in families:
                    for method, run in stage.items():
                        if method not in ONCE or seed == SEEDS[0]:
                            yield family, seed, method, run


def measure(results: Results, work: Path, sizes: Sizes, given: argparse.Namespace) -> None:
    families = {name: family_of(name, sizes) for name in given.family}
    for name, seed, method, run in order(given.family, given.seeds):
        key = f"{method}, seed {seed}"
        if given.methods and method not in given.methods:
            continue
        if key in results.read()["families"].get(name, {}).get("runs", {}):
            continue
        chosen = rates(results, work, sizes) if method.partition(", ")[0] in KINDS else {}
        folder = work / "runs" / name
        outcome = run(Context(families[name], seed, folder, chosen))
        losses = families[name].test_losses(outcome.folder)
        shutil.rmtree(folder, ignore_errors=True)  # the numbers are what is kept
        record = {
            "cpu": round(outcome.cpu, 1),
            "tokens": outcome.tokens,
            "chosen": outcome.chosen,
            "details": outcome.details,
            "parts": {d: [round(p, 3) for p in m.parts] for d, m in losses.items()},
        }
        weights = {domain: [int(w) for w in metric.weights] for domain, metric in losses.items()}
        at = ["families", name]
        results.add(([*at, "weights"], weights), ([*at, "runs", key], record))
        mean = sum(m.value for m in losses.values()) / len(losses)
        print(f"{name}, {key}: {mean:.4f}, {outcome.cpu:.0f} s of CPU", flush=True)


def rates(results: Results, work: Path, sizes: Sizes) -> dict[str, float]:
    """The trainings' learning rates, chosen on the zoo's validation rows with the first seed."""
    zoo = family_of("zoo", sizes)
    for kind in KINDS:
        for rate in RATES[kind]:
            if f"{rate:g}" in results.read()["rates"].get(kind, {}):
                continue
            start = soup(Context(zoo, SEEDS[0], work / "runs" / "rates", {})).folder
            found = train(kind, zoo, start, sizes.budget(""), rate, SEEDS[0], None)
            results.add((["rates", kind, f"{rate:g}"], min(found.losses)))
            print(f"{kind} with {rate:g}: {min(found.losses):.4f}", flush=True)
    return {
        kind: float(min(tried, key=tried.__getitem__))
        for kind, tried in results.read()["rates"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--quick", action="store_true", help="tiny, into .cache: does it run?")
    parser.add_argument("--table", action="store_true", help="measure nothing more")
    given = parser.parse_args()
    work, file, sizes = WORK / "study", DOCS / "study.json", FULL
    if given.quick:
        work, sizes = WORK / "study-quick", QUICK
        shutil.rmtree(work, ignore_errors=True)
        file, given.seeds = work / "study.json", given.seeds[:1]
    results = Results(file)
    if not given.table:
        torch.set_num_threads(1)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        transformers.utils.logging.disable_progress_bar()
        measure(results, work, sizes, given)
    publish(results.read(), None if not given.quick else work)
    print("the tables are up to date", file=sys.stderr)


if __name__ == "__main__":
    main()
