"""Rounds of measurements: the floor and the contenders take turns over one family's merges."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_process import BenchError, evict, run_measured, touch_memory
from bench_recipes import METHODS, Method, models_of, weight_files, write_recipe
from bench_report import FLOOR, MERGEKIT, OURS, Raw, Round, summarise

_FLOOR_SCRIPT = Path(__file__).resolve().with_name("bench_floor.py")
_SHARD_BYTES = 5_000_000_000  # merge-cli's default --shard-size
_HEADROOM = 500_000_000
_BUSY = 0.15  # of all cores' time, taken by others: the figures are in doubt


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Contender:
    """Who takes part: how it is started, with which flags, in how many of the rounds."""

    name: str
    command: list[str]
    env: dict[str, str]
    flags: list[str]
    rounds: int

    @property
    def python(self) -> str | None:
        """The Python that runs it; None where it was given as a command of its own."""
        return self.command[0] if self.command[1:2] == ["-m"] else None


@dataclass
class Bench:
    """One run of the benchmark: its places, its contenders, what went wrong."""

    work: Path
    threads: int
    contenders: list[Contender]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clean()

    @property
    def folder(self) -> Path:
        """What a measured process may write in; another run of this script has another."""
        return self.work / f"run-{os.getpid()}"

    def clean(self) -> None:
        """Delete what a process wrote and let the disk come to rest."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        os.sync()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            say(f"note: {text}")

    def row(self, name: str, family: Path, cache: str, rounds: int) -> dict[str, Any]:
        """One method with the cache in one state: every round of every contender."""
        method = METHODS[name]
        files = weight_files(models_of(family, method))
        self.settle(files, written_bytes(family), cache)
        out: list[Round] = []
        failed: set[str] = set()
        for number in range(rounds):
            turn = [c for c in self.contenders if number < c.rounds and c.name not in failed]
            turn = [c for c in turn if c.name != MERGEKIT or method.mergekit]
            names = [FLOOR, *(contender.name for contender in turn)]
            by_name = {contender.name: contender for contender in turn}
            one: Round = {}
            for who in names if number % 2 == 0 else reversed(names):
                if cache == "cold":
                    evict(files)
                touch_memory(written_bytes(family) + _HEADROOM)
                try:
                    one[who] = (
                        self.floor(files, written_bytes(family))
                        if who == FLOOR
                        else self.merge(by_name[who], family, method)
                    )
                except BenchError as error:
                    failed.add(who)
                    self.note(f"{name}, {cache}: {who} failed: {error}")
                finally:
                    self.clean()
                if who in one:
                    seconds = one[who]["seconds"]
                    say(f"{name} {cache} {number + 1}/{rounds} {who}: {seconds:.2f} s")
            out.append(one)
        self.check(name, out)
        return {
            "method": name,
            "cache": cache,
            "target": method.target,
            "summary": summarise(out),
            "rounds": out,
        }

    def floor(self, files: list[Path], written: int) -> Raw:
        """The start of a Python with torch, and the bytes moved."""
        ours = self.contenders[0]
        python = ours.python or sys.executable
        started = run_measured([python, "-c", "import torch"], ours.env, self.folder)
        touch_memory(written + _HEADROOM)
        moved = self.move(files, written)
        return {
            "seconds": started.seconds + moved["seconds"],
            "user_seconds": started.user_seconds + moved["user_seconds"],
            "system_seconds": started.system_seconds + moved["system_seconds"],
            "io_user_seconds": moved["user_seconds"],
            "io_system_seconds": moved["system_seconds"],
            "max_rss": started.max_rss,
            "peak_anonymous": started.peak_anonymous,
            "others_share": started.others_share,
            "import_seconds": started.seconds,
            "io_seconds": moved["seconds"],
            "bytes_read": moved["read"],
            "bytes_written": moved["written"],
            "threads": self.threads,
        }

    def move(self, files: list[Path], written: int) -> dict[str, Any]:
        """bench_floor.py in a process of its own."""
        sizes = [min(_SHARD_BYTES, written - at) for at in range(0, written, _SHARD_BYTES)]
        spec = {
            "inputs": [str(file.absolute()) for file in files],
            "outputs": [[str(self.folder / f"floor-{i}"), size] for i, size in enumerate(sizes)],
            "threads": self.threads,
        }
        path = self.folder / "floor.json"
        path.write_text(json.dumps(spec))
        command = [sys.executable, str(_FLOOR_SCRIPT), str(path)]
        moved = run_measured(command, dict(os.environ), self.folder)
        result: dict[str, Any] = json.loads(moved.output)
        return result

    def settle(self, files: list[Path], written: int, cache: str) -> None:
        """Move the bytes once, unmeasured; say so where the inputs cannot all stay in the cache.

        With the writes: in a virtual machine, memory that was not used before costs several times
        as much, and who comes first would pay for it.
        """
        held = sum(file.stat().st_size for file in files)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if cache == "warm" and held > 0.8 * memory:
            sizes = f"{held / 1e9:.0f} GB of inputs, {memory / 1e9:.0f} GB of memory"
            self.note(f"{sizes}: the cache cannot be warm")
        self.move(files, written)
        self.clean()

    def merge(self, contender: Contender, family: Path, method: Method) -> Raw:
        """One merge, with what its own report says where it writes one."""
        recipe, out = self.folder / "recipe.yaml", self.folder / "out"
        is_mergekit = contender.name == MERGEKIT
        write_recipe(recipe, family, method, mergekit=is_mergekit)
        verb = [] if is_mergekit else ["run"]
        command = [*contender.command, *verb, str(recipe), str(out), *contender.flags]
        usage = run_measured(command, contender.env, self.folder)
        raw: Raw = {k: v for k, v in asdict(usage).items() if k != "output"}
        report_file = out / "merge_report.json"
        if report_file.exists():
            report = json.loads(report_file.read_text())
            cost = report["cost"]
            raw |= {
                "own_seconds": cost.get("seconds"),
                "own_peak_rss": cost.get("peak_rss"),
                "bytes_read": cost.get("bytes_read"),
                "bytes_written": cost.get("bytes_written"),
                "stages": cost.get("stages"),
                "threads": report.get("threads"),
            }
        return raw

    def warm_up(self, family: Path, names: Sequence[str]) -> None:
        """Merge the tiny family, unmeasured; what fails here is told when it is measured."""
        for name in names:
            for contender in self.contenders:
                if contender.name == MERGEKIT and not METHODS[name].mergekit:
                    continue
                try:
                    self.merge(contender, family, METHODS[name])
                except BenchError:
                    say(f"{name} {contender.name}: failed on the tiny family")
                self.clean()

    def check(self, name: str, rounds: Sequence[Round]) -> None:
        """Whether floor and merge were the same work, and had the machine to themselves."""
        shares = [raw.get("others_share") or 0.0 for one in rounds for raw in one.values()]
        if max(shares, default=0.0) > _BUSY:
            self.note(f"{name}: others took up to {max(shares):.0%} of the machine's CPU time")
        for one in rounds:
            ours, floor = one.get(OURS), one.get(FLOOR)
            if not ours or not floor:
                continue
            if ours.get("threads") not in (None, floor["threads"]):
                theirs = f"the floor {floor['threads']}"
                self.note(f"{name}: the merge used {ours['threads']} threads, {theirs}")
            for key in ("bytes_read", "bytes_written"):
                mine, plain = ours.get(key), floor[key]
                if mine and abs(mine / plain - 1) > 0.01:
                    what = f"{key}: {mine / 1e9:.2f} GB, the floor's {plain / 1e9:.2f} GB"
                    self.note(f"{name}: {what}")


def written_bytes(family: Path) -> int:
    """A merge writes as many bytes of weights as one model has."""
    return sum(file.stat().st_size for file in weight_files([family / "model0"]))
