"""How far do threads go? The share of a worker's time under Python's lock, and what follows.

    python scripts/bench_scaling.py FAMILY                         # measure and project
    python scripts/bench_scaling.py FAMILY --threads 1,8,32,64     # run: a minute on a large server

FAMILY is a folder of scripts/synthetic.py, or `moe` and `dense` there. Everything happens in this
process, warm, without the start of Python.

Measuring, with one thread: every call that gives the lock back (reads, writes, compiled loops,
numpy's sort) is timed with the thread's CPU clock. What is left of the thread's CPU time held the
lock. The clock itself is subtracted.

Projecting: threads that work by themselves for P and then need the one lock for H are a closed
queue with a single server; mean value analysis gives its throughput exactly for exponential times
(Reiser and Lavenberg 1980): R(n) = H (1 + Q(n-1)), X(n) = n / (P + R(n)), Q(n) = X(n) R(n).

Replaying (--replay) tests the projection without the cores: the same merge runs with that many
threads, and each call without the lock sleeps for as long as it took, or several times that, and
does nothing. What Python does is all done. For methods that do not look for thresholds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bench_recipes import METHODS, write_recipe

import merge_cli
from merge_cli.engine.pool import Pool
from merge_cli.kernels.compiled.kernel import Kernel
from merge_cli.system import raw_io

_PROJECTED = (1, 2, 8, 16, 32, 64)
_PLENTY = 64_000_000_000  # bytes: no thread is left out


@dataclass
class Measured:
    """What the worker's CPU time went to, in seconds.

    Attributes:
        unlocked: inside calls that give the lock back, by what is called.
        calls: their number, by what is called.
        values: what each returned last.
        worker: of the whole thread, without the clock's own calls.
    """

    unlocked: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    worker: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def parallel(self) -> float:
        return sum(self.unlocked.values())

    @property
    def locked(self) -> float:
        return max(self.worker - self.parallel, 0.0)

    def add(self, name: str, seconds: float, value: Any) -> None:
        with self.lock:
            self.values[name] = value
            self.unlocked[name] = self.unlocked.get(name, 0.0) + seconds
            self.calls[name] = self.calls.get(name, 0) + 1


Around = Callable[[str, Callable[..., Any]], Callable[..., Any]]


class _System:
    """`os` as raw_io sees it, with its writes replaced."""

    def __init__(self, pwrite: Callable[..., Any]) -> None:
        self.pwrite = pwrite

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@contextmanager
def around_unlocked_calls(around: Around) -> Iterator[None]:
    """Replace reads, writes and the loops that are compiled by what `around` makes of them."""
    kernels = [(kernel, kernel._compiled) for kernel in _kernels() if kernel._compiled]
    for kernel, function in kernels:
        kernel._compiled = around(kernel._function.__name__, function)
    try:
        with (
            mock.patch.object(raw_io, "os", _System(around("pwrite", os.pwrite))),
            mock.patch.object(raw_io, "_PREADV", around("preadv", os.preadv)),
            mock.patch.object(np, "sort", around("sort", np.sort)),
        ):
            yield
    finally:
        for kernel, function in kernels:
            kernel._compiled = function


def _kernels() -> list[Kernel]:
    from merge_cli.kernels import compiled

    return [v for n in compiled.__all__ if isinstance(v := getattr(compiled, n), Kernel)]


def merge_once(recipe: Path, out: Path, threads: int) -> tuple[float, dict[str, Any]]:
    """Seconds of the loop alone, and the report's cost."""
    shutil.rmtree(out, ignore_errors=True)
    options = merge_cli.MergeOptions(device="cpu", threads=threads, max_memory=_PLENTY)
    cost = merge_cli.merge(recipe, out, options=options).report["cost"]
    shutil.rmtree(out)
    return float(cost["seconds"]), cost


def measured(recipe: Path, out: Path) -> Measured:
    """One merge by one thread."""
    result = Measured()
    clock = time.thread_time
    began = clock()
    for _ in range(20_000):
        clock()
    tick = (clock() - began) / 20_000

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = clock()
            value = function(*arguments)
            result.add(name, clock() - began - tick, value)
            return value

        return timed

    work = Pool._work

    def worked(pool: Pool) -> None:
        began = clock()
        work(pool)
        result.worker = clock() - began

    with around_unlocked_calls(around), mock.patch.object(Pool, "_work", worked):
        merge_once(recipe, out, 1)
    result.worker -= 2 * tick * sum(result.calls.values())
    return result


def replayed(recipe: Path, out: Path, of: Measured, threads: int, pace: float) -> float:
    """Seconds of the loop where each call without the lock sleeps `pace` times what it took."""
    mean = {name: pace * of.unlocked[name] / count for name, count in of.calls.items()}

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        pause, value = mean.get(name, 0.0), of.values.get(name)

        def paused(*arguments: Any) -> Any:
            time.sleep(pause)
            if name == "preadv":
                return sum(map(len, arguments[1]))
            if name == "merge_streams":
                return len(arguments[4])  # all jobs are done
            return len(arguments[1]) if name == "pwrite" else value

        return paused

    with around_unlocked_calls(around):
        return merge_once(recipe, out, threads)[0]


def throughput(parallel: float, locked: float, threads: int) -> float:
    """How many times as fast as one thread: the exact solution of the closed queue."""
    waiting = 0.0
    rate = 0.0
    for n in range(1, threads + 1):
        response = locked * (1 + waiting)
        rate = n / (parallel + response)
        waiting = rate * response
    return rate * (parallel + locked)


def project(recipe: Path, out: Path, gigabytes: float, given: argparse.Namespace) -> None:
    merge_once(recipe, out, 1)  # compiled, and in the cache
    m = min((measured(recipe, out) for _ in range(given.rounds)), key=lambda m: m.locked)
    print("| calls without the lock | held, ms | free, ms | locked share | ", end="")
    print(" | ".join(f"{n} threads" for n in _PROJECTED), "|")
    print("|---:|---:|---:|---:|" + "---:|" * len(_PROJECTED))
    gains = [throughput(m.parallel, m.locked, n) for n in _PROJECTED]
    print(f"| {sum(m.calls.values())} | {1e3 * m.locked:.0f} | {1e3 * m.parallel:.0f} ", end="")
    print(f"| {m.locked / (m.locked + m.parallel):.1%} ", end="")
    print("| " + " | ".join(f"{gain:.1f}" for gain in gains) + " |")
    rate = gigabytes / (m.locked + m.parallel)
    print(f"\nOne thread: {rate:.2f} GB/s of inputs, by CPU time. Without the lock:")
    for name, seconds in sorted(m.unlocked.items(), key=lambda item: -item[1])[:8]:
        calls = m.calls[name]
        print(f"  {name}: {calls} calls, {1e6 * seconds / calls:.0f} us each")
    for n in given.replay or ():
        one, many = (replayed(recipe, out, m, threads, given.pace) for threads in (1, n))
        expected = throughput(given.pace * m.parallel, m.locked, n)
        print(f"Replayed with {n} threads at {given.pace:g} times the pauses: ", end="")
        print(f"{one / many:.1f} times one thread; the model says {expected:.1f}.")


def run(recipe: Path, out: Path, gigabytes: float, threads: list[int], rounds: int) -> None:
    merge_once(recipe, out, max(threads))
    print("| threads | s | GB/s of inputs | times the first |\n|---:|---:|---:|---:|")
    first = None
    for n in threads:
        seconds = min(merge_once(recipe, out, n)[0] for _ in range(rounds))
        first = first or seconds
        print(f"| {n} | {seconds:.2f} | {gigabytes / seconds:.2f} | {first / seconds:.2f} |")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("family", type=Path)
    add("--method", choices=METHODS, default="soup")
    add("--threads", type=numbers, help="run with so many instead, e.g. 1,8,32,64")
    add("--replay", type=numbers, help="test the model with so many threads that sleep")
    add("--pace", type=float, default=4.0, help="of the pauses, on a machine with few cores")
    add("--rounds", type=int, default=3, help="the best of so many")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.family.parent) as folder:
        recipe, out = Path(folder) / "recipe.yaml", Path(folder) / "out"
        write_recipe(recipe, given.family.absolute(), METHODS[given.method])
        gigabytes = merge_cli.plan(recipe).bytes_read / 1e9
        if given.threads:
            run(recipe, out, gigabytes, given.threads, given.rounds)
        else:
            project(recipe, out, gigabytes, given)


if __name__ == "__main__":
    main()
