"""Planning alone: `merge-cli plan` for models of 100,000 tensors, which are headers and holes.

The floor is a fresh Python that reads the same headers and parses them with `json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_process import run_measured
from bench_recipes import METHODS, models_of, weight_files, write_recipe
from bench_report import markdown, spread, spread_text
from bench_rounds import Contender, say
from synthetic import Settings, Size, tensors

_LAYERS, _PER_EXPERT = 60, 3
_SIZE = Size(_LAYERS, 8, 2, 1_000, 8)

# What a fresh Python runs to time `make_plan` without the start of the process.
_IN_PROCESS = """
import sys, time
import merge_cli
merge_cli.plan
began = time.perf_counter()
merge_cli.plan(sys.argv[1])
print(time.perf_counter() - began)
"""
_PARSE = """
import json, struct, sys, time
began = time.perf_counter()
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
print(time.perf_counter() - began)
"""


def plan_settings(count: int, shards: int) -> Settings:
    """A mixture of experts of about `count` tiny tensors."""
    experts = max(1, (count - sum(1 for _ in tensors(_SIZE))) // (_LAYERS * _PER_EXPERT))
    return Settings(replace(_SIZE, experts=experts), shards=shards or 16, header_only=True)


def measure_plans(
    contenders: Sequence[Contender], family: Path, folder: Path, method: str, rounds: int
) -> list[dict[str, Any]]:
    """Alternate the contenders; their raw seconds, a dictionary for each round.

    Args:
        folder: where the recipe is written and the processes run.
    """
    recipe = folder / f"{method}.yaml"
    write_recipe(recipe, family, METHODS[method])
    files = [str(path) for path in weight_files(models_of(family, METHODS[method]))]
    measured = []
    for number in range(rounds):
        one: dict[str, Any] = {}
        for who in contenders if number % 2 == 0 else reversed(contenders):
            parsed = run_measured([sys.executable, "-c", _PARSE, *files], who.env, folder)
            whole = run_measured([*who.command, "plan", str(recipe)], who.env, folder)
            one[who.name] = {
                "json_seconds": float(parsed.output),
                "seconds": whole.seconds,
                "max_rss": whole.max_rss,
            }
            if who.python:
                command = [who.python, "-c", _IN_PROCESS, str(recipe)]
                inside = run_measured(command, who.env, folder)
                one[who.name]["make_plan_seconds"] = float(inside.output)
            say(f"plan {number + 1}/{rounds} {who.name}: {json.dumps(one[who.name])}")
        measured.append(one)
    return measured


def plan_table(rounds: Sequence[dict[str, Any]]) -> str:
    """A line for each contender."""
    lines = []
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        cells = [name]
        for key in ("json_seconds", "make_plan_seconds", "seconds"):
            values = [run[key] for run in runs if key in run]
            cells.append(spread_text(spread(values)) if values else "")
        cells.append(f"{max(run['max_rss'] for run in runs) / 1e6:.0f}")
        lines.append(cells)
    columns = ["of", "headers as JSON s", "make_plan s", "merge-cli plan s", "peak MB"]
    return markdown(columns, lines, left=1)
