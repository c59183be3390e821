"""From raw measurements to medians, ratios and Markdown; and what machine it was."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Of one contender in one round; the keys are those of the JSON file.
Raw = dict[str, Any]
Round = dict[str, Raw]

OURS, FLOOR, MERGEKIT = "ours", "floor", "mergekit"


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and largest."""
    listed = list(values)
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed)}


def summarise(rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """For each contender: its times and peaks, and the ratios of ours to it, round by round."""
    names = dict.fromkeys(name for one in rounds for name in one)
    summary: dict[str, dict[str, Any]] = {}
    for name in names:
        runs = [one[name] for one in rounds if name in one]
        both = [one for one in rounds if name in one and OURS in one]
        summary[name] = {
            "runs": len(runs),
            "seconds": spread(run["seconds"] for run in runs),
            "user_seconds": spread(run["user_seconds"] for run in runs),
            "system_seconds": spread(run["system_seconds"] for run in runs),
            "cpu_seconds": spread(map(cpu_seconds, runs)),
            "max_rss": max(run["max_rss"] for run in runs),
            "own_peak_rss": _largest(run.get("own_peak_rss") for run in runs),
            "peak_anonymous": _largest(run.get("peak_anonymous") for run in runs),
        }
        if name == FLOOR:
            summary[name]["io_seconds"] = spread(run["io_seconds"] for run in runs)
        if both and name != OURS:
            ratios = [one[OURS]["seconds"] / one[name]["seconds"] for one in both]
            summary[name]["ours_to_this"] = spread(ratios)
            ratios = [cpu_seconds(one[OURS]) / cpu_seconds(one[name]) for one in both]
            summary[name]["cpu_ours_to_this"] = spread(ratios)
    return summary


def cpu_seconds(run: Raw) -> float:
    """User and system time of a run."""
    return float(run["user_seconds"] + run["system_seconds"])


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Times and ratios: a line for each method and state of the cache."""
    others = list(dict.fromkeys(name for row in rows for name in row["summary"]))
    others = [name for name in others if name not in (OURS, FLOOR)]
    columns = [
        "method",
        "cache",
        "floor s",
        "of it I/O s",
        "ours s",
        "ours / floor",
        "target",
        "user s",
        "system s",
        "floor's CPU s",
        "CPU / floor's",
        "peak MB",
        "own report MB",
        "anonymous MB",
    ]
    left = len(columns)
    for name in others:
        ratio = f"{name} / ours" if name == MERGEKIT else f"ours / {name}"
        columns += [f"{name} s", ratio, f"{name} user s", f"{name} system s", f"CPU, {ratio}"]
        columns += [f"{name} peak MB"]
    lines = []
    for row in rows:
        summary = row["summary"]
        cells = [row["method"], row["cache"]]
        if OURS in summary and FLOOR in summary:
            cells += _own_cells(summary, row["target"])
        cells += [""] * (left - len(cells))
        for name in others:
            cells += _other_cells(summary.get(name), inverted=name == MERGEKIT)
        lines.append(cells)
    return markdown(columns, lines, left=2)


def _own_cells(summary: dict[str, dict[str, Any]], target: float) -> list[str]:
    ours, floor = summary[OURS], summary[FLOOR]
    ratio = floor["ours_to_this"]
    met = "met" if ratio["median"] <= target else "**missed**"
    return [
        spread_text(floor["seconds"]),
        f"{floor['io_seconds']['median']:.2f}",
        spread_text(ours["seconds"]),
        spread_text(ratio),
        f"{target:g} {met}",
        f"{ours['user_seconds']['median']:.2f}",
        f"{ours['system_seconds']['median']:.2f}",
        f"{floor['cpu_seconds']['median']:.2f}",
        spread_text(floor["cpu_ours_to_this"]),
        _megabytes(ours["max_rss"]),
        _megabytes(ours["own_peak_rss"]),
        _megabytes(ours["peak_anonymous"]),
    ]


def _other_cells(other: dict[str, Any] | None, *, inverted: bool) -> list[str]:
    """Times, ratios and peak of whom we are compared with; empty where it took no part."""
    if other is None or "ours_to_this" not in other:
        return [""] * 6
    wall, cpu = other["ours_to_this"], other["cpu_ours_to_this"]
    if inverted:
        wall, cpu = (
            {"median": 1 / r["median"], "min": 1 / r["max"], "max": 1 / r["min"]}
            for r in (wall, cpu)
        )
    return [
        spread_text(other["seconds"]),
        spread_text(wall),
        f"{other['user_seconds']['median']:.2f}",
        f"{other['system_seconds']['median']:.2f}",
        spread_text(cpu),
        _megabytes(other["max_rss"]),
    ]


def stage_table(rows: Sequence[dict[str, Any]]) -> str:
    """What merge_report.json says of each stage, whatever it says: the median over the rounds."""
    found: list[tuple[list[str], dict[str, float]]] = []
    for row in rows:
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for one in row["rounds"]:
            for name, raw in one.items():
                for stage, clock in (raw.get("stages") or {}).items():
                    runs.setdefault((name, stage), []).append(clock)
        for (name, stage), clocks in runs.items():
            found.append(([row["method"], row["cache"], name, stage], _medians(clocks)))
    keys = list(dict.fromkeys(key for _, values in found for key in values))
    lines = [[*where, *(_figure(values.get(key)) for key in keys)] for where, values in found]
    return markdown(["method", "cache", "of", "stage", *keys], lines, left=4) if lines else ""


def _medians(clocks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every figure in the records of one stage."""
    keys = dict.fromkeys(key for clock in clocks for key in clock)
    values = {key: [c[key] for c in clocks if isinstance(c.get(key), int | float)] for key in keys}
    return {key: statistics.median(listed) for key, listed in values.items() if listed}


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def spread_text(value: dict[str, float]) -> str:
    if value["min"] == value["max"]:
        return f"{value['median']:.2f}"
    return f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are text and the others figures."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *lines])


def machine(work: Path, checkout: Path) -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": usable_cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk": _mount(work),
        "disk_free": shutil.disk_usage(work).free,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "numpy", "numba", "safetensors")},
        "commit": _commit(checkout),
    }


def machine_line(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    memory = f"{found['memory'] / 2**30:.0f} GiB of memory"
    return (
        f"{found['processor']}, {found['cores']} cores, {memory}; {found['disk']}; "
        f"{found['system']}; Python {found['python']}, {versions}; "
        f"merge-cli at {found['commit']}; {found['date']}"
    )


def usable_cores() -> int:
    """As merge-cli counts them when --threads is not given."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_line(file: str, key: str) -> str:
    """The value of the first `key : value` in a file of /proc."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _mount(folder: Path) -> str:
    """Device and type of the file system that holds the folder."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown disk"
    holding = [m for m in mounts if folder.resolve().is_relative_to(m[1])]
    device, _, kind, *_ = max(holding, key=lambda m: len(m[1]))
    return f"{device} ({kind})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str:
    """The commit, with a + where files have changed since."""
    git = ["git", "-C", str(checkout)]
    try:
        command = [*git, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        command = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"
    return commit + ("+" if changed else "")
