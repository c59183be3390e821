"""A process run to its end and measured; the page cache put into a known state before it.

Nothing large is imported here: on Linux a child's ru_maxrss starts from its parent's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_POLL_SECONDS = 0.02


class BenchError(Exception):
    """A measured process failed; the message holds the end of what it said."""


@dataclass(frozen=True)
class Usage:
    """What a whole process took.

    Attributes:
        seconds: wall time, from before the fork until it was waited for.
        user_seconds, system_seconds: CPU time of all its threads, in itself and in the kernel.
        max_rss: peak resident bytes, as the operating system counts them.
        peak_anonymous: peak resident bytes that no file backs, polled every 20 ms; None where
            there is no /proc.
        others_share: the share of all cores' time that everything else took meanwhile, kernel
            threads that write back included; None where there is no /proc.
        output: its standard output.
    """

    seconds: float
    user_seconds: float
    system_seconds: float
    max_rss: int
    peak_anonymous: int | None
    others_share: float | None
    output: str

    @property
    def cpu_seconds(self) -> float:
        """User and system time."""
        return self.user_seconds + self.system_seconds


def run_measured(command: Sequence[str], env: Mapping[str, str], cwd: Path) -> Usage:
    """Run a command.

    Raises:
        BenchError: it failed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy = _busy_seconds()
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=err)
        poll = _AnonymousPoll(process.pid)
        poll.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            poll.stop()
        others = _busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        out.seek(0)
        err.seek(0)
        output, said = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode:
        what = f"{' '.join(command)}: exit code {process.returncode}"
        raise BenchError(f"{what}\n{(said or output)[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    share = max(0.0, others / seconds / (os.cpu_count() or 1)) if busy else None
    return Usage(
        seconds,
        usage.ru_utime,
        usage.ru_stime,
        usage.ru_maxrss * unit,
        poll.peak,
        share,
        output,
    )


def _busy_seconds() -> float:
    """CPU time that the machine has spent on anything since it started; 0 where it does not say."""
    try:
        with open("/proc/stat", "rb") as file:
            user, nice, system, _idle, _wait, *rest = map(int, file.readline().split()[1:])
    except OSError:
        return 0.0
    stolen = sum(rest[:3])  # interrupts, and what the hypervisor gave to others
    return float(user + nice + system + stolen) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turns:
    """Commands of merge-cli that take turns, and how they are measured.

    Attributes:
        cases: arguments of merge-cli by what is printed of them; the first is the peer.
        out: what a command writes; removed before each.
        before: another checkout, measured in the same rounds; None measures this one alone.
        only: parts of labels to measure beside the peer; all where there are none.
    """

    cases: Mapping[str, Sequence[str]]
    folder: Path
    out: Path
    rounds: int
    before: str | None = None
    only: Sequence[str] = ()

    def run(self, title: str) -> None:
        """Print a table of CPU seconds, ratios to the peer's round by round, and peaks.

        One more round comes before: it compiles, fills the page cache, and does not count.
        """
        root = str(Path(__file__).resolve().parents[1])
        checkouts = {"": root, **({" before": self.before} if self.before else {})}
        peer, *others = self.cases
        labels = [peer, *(o for o in others if not self.only or any(w in o for w in self.only))]
        usages: dict[str, list[Usage]] = {}
        for number in range(self.rounds + 1):
            for label in labels:
                for suffix, checkout in checkouts.items():
                    shutil.rmtree(self.out, ignore_errors=True)
                    command, environment = command_of(checkout)
                    usage = run_measured([*command, *self.cases[label]], environment, self.folder)
                    if number:
                        usages.setdefault(label + suffix, []).append(usage)
        shutil.rmtree(self.out, ignore_errors=True)
        print(f"| {title} | CPU s | times a soup | s | peak MB |\n|---|---:|---:|---:|---:|")
        for label in labels:
            for suffix in checkouts:
                _print_row(label + suffix, usages[label + suffix], usages[peer + suffix])


def _print_row(label: str, runs: Sequence[Usage], peer: Sequence[Usage]) -> None:
    ratios = [a.cpu_seconds / b.cpu_seconds for a, b in zip(runs, peer, strict=True)]
    print(
        f"| {label} | {median(run.cpu_seconds for run in runs):.2f} "
        f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {median(run.seconds for run in runs):.2f} "
        f"| {max(run.peak_anonymous or 0 for run in runs) / 1e6:.0f} |",
        flush=True,
    )


class _AnonymousPoll(threading.Thread):
    """Follows RssAnon of a process until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak: int | None = None
        self._path = f"/proc/{pid}/status"
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                with open(self._path, "rb") as file:
                    status = file.read()
            except OSError:
                return
            # A process that has ended but was not waited for has no such line any more.
            _, found, rest = status.partition(b"RssAnon:")
            if found:
                self.peak = max(self.peak or 0, int(rest.split(None, 1)[0]) * 1024)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def touch_memory(size: int) -> None:
    """Use `size` bytes of free memory and give them back, in a process of its own.

    In a virtual machine the first touch of a page is the host's work, at a fraction of memory's
    speed, and free pages go back to the host after a while. Whoever is measured next should find
    the pages in place; no more are touched than are free, so that no cached file has to go.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    lines = (line.split() for line in meminfo.read_text().splitlines())
    free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemFree:")
    code = (
        "import mmap, sys\n"
        "memory = mmap.mmap(-1, int(sys.argv[1]))\n"
        "for at in range(0, len(memory), 4096): memory[at] = 1\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(max(4096, min(size, free * 9 // 10)))], check=True
    )


def evict(files: Iterable[Path]) -> None:
    """Drop the files from the page cache; dirty pages cannot be dropped, so they are synced."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def command_of(given: str) -> tuple[list[str], dict[str, str]]:
    """How to start a merge-cli, and its environment.

    Args:
        given: a checkout (run by this Python), another Python that has merge-cli installed, or a
            merge-cli command.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its byte code
    path = Path(given).expanduser().absolute()  # not resolved: a venv's python is a link
    if path.is_dir():
        return [sys.executable, "-m", "merge_cli"], {**env, "PYTHONPATH": str(path)}
    if path.name.startswith("python"):
        return [str(path), "-m", "merge_cli"], env
    return [str(path)], env
