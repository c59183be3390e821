"""How long a large merge takes on 1, 4 and 16 nodes, and what limits it: arithmetic.

    python scripts/plan_nodes.py --parameters 500 --method dare_ties --shared 20,10

A merge takes as long as the slowest of three things: the cores of all nodes, what each node gets
from the storage, and what the storage gives to all of them together. The core-seconds are those of
docs/scaling.md, which were measured; the bandwidths are yours.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

# Core-seconds of computing for a billion parameters of each model that is written, with three
# sources (docs/scaling.md), and what copying to and from the system's cache adds.
CORE_SECONDS = {
    "soup": 0.5,
    "task_arithmetic": 0.6,
    "slerp": 0.9,
    "dare_ties": 1.7,
    "ties": 4.3,
}
COPYING = 3.0
MODELS_READ = {"soup": 3, "task_arithmetic": 4, "slerp": 2, "dare_ties": 4, "ties": 4}
BYTES = 2  # of a weight in 16 bits
START_SECONDS = 15.0  # until every node's process has imported and checked what it merges
LOCKED = 25e9  # bytes a second of 16-bit inputs, where Python's lock stops one process


@dataclass(frozen=True)
class Machines:
    """What a cluster has.

    Attributes:
        cores: of each node.
        link: bytes a second between a node and the storage, in each direction.
        read, write: bytes a second that the storage gives to all nodes together.
    """

    cores: int
    link: float
    read: float
    write: float


@dataclass(frozen=True)
class Forecast:
    """Seconds on some nodes, and what they are spent on."""

    seconds: float
    limit: str


def forecast(method: str, parameters: float, nodes: int, machines: Machines) -> Forecast:
    """The time of a merge of so many parameters, with whole models in 16 bits."""
    read = MODELS_READ[method] * parameters * BYTES
    written = parameters * BYTES
    core_seconds = (CORE_SECONDS[method] + COPYING) * parameters / 1e9
    limits = {
        "cores": core_seconds / (nodes * machines.cores),
        "Python's lock": read / (nodes * LOCKED),
        "each node's link": max(read, written) / (nodes * machines.link),
        "the shared storage": read / machines.read + written / machines.write,
    }
    limit = max(limits, key=lambda name: limits[name])
    return Forecast(START_SECONDS + limits[limit], limit)


def table(
    methods: Sequence[str], parameters: float, counts: Sequence[int], machines: Machines
) -> list[str]:
    """A Markdown table: a row for each method and number of nodes."""
    lines = ["| method | nodes | time | limit |", "|---|---:|---:|---|"]
    for method in methods:
        for nodes in counts:
            result = forecast(method, parameters, nodes, machines)
            minutes = result.seconds / 60
            lines.append(f"| {method} | {nodes} | {minutes:.1f} min | {result.limit} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--parameters", type=float, default=500, help="billions, of one model")
    parser.add_argument("--method", nargs="+", choices=CORE_SECONDS, default=["soup", "ties"])
    parser.add_argument("--nodes", default="1,4,16", help="numbers of nodes")
    parser.add_argument("--cores", type=int, default=16, help="of each node")
    parser.add_argument("--link", type=float, default=5, help="GB/s of each node, each direction")
    parser.add_argument("--shared", default="20,10", help="GB/s read and written, of all nodes")
    given = parser.parse_args(arguments)
    read, write = (float(number) * 1e9 for number in given.shared.split(","))
    machines = Machines(given.cores, given.link * 1e9, read, write)
    counts = [int(number) for number in given.nodes.split(",")]
    print("\n".join(table(given.method, given.parameters * 1e9, counts, machines)))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
