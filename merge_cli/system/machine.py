"""What this process may use of the machine: cores, threads, memory, and a home folder.

A container or a batch system grants less than the machine has, and the usual calls do not say so:
`os.cpu_count` counts the machine's cores, /proc/meminfo the machine's memory. Everything that
decides by either asks here.

    usable_cores     affinity, CPU quotas of control groups (v1 and v2), what SLURM has granted
    library_threads  the same for torch and BLAS, where OMP_NUM_THREADS has the last word
    free_memory      what the system has left, or the nearest limit of a control group
    home_folder      HOME, or a private stand-in where a container has none
    parse_size       5GB, 512MB, 4GiB, 1.5G as bytes; `show_size` writes them

Control groups nest, and each one above ours binds, too. Imports nothing heavy.
"""

from __future__ import annotations

import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merge_cli.errors import UsageError
from merge_cli.system.libraries import require
from merge_cli.system.notices import say_once

_GRANTED = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")
_MOST_THREADS = 1024
_LIBRARIES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Cached files are given up when memory is wanted. Anonymous memory and tmpfs are not.
_RECLAIMABLE = ("inactive_file", "active_file")
_SYSTEM = Path("/")


@dataclass(frozen=True)
class _Group:
    """One control group that binds us."""

    folder: Path
    version: int

    def number(self, name: str) -> int | None:
        """The number in one of its files; None for `max`, -1, or no such file."""
        text = _read(self.folder / name)
        return int(text) if text.isdecimal() else None

    def numbers(self, name: str) -> dict[str, int]:
        """A file of names and numbers."""
        pairs = (line.split() for line in _read(self.folder / name).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}

    def cores(self) -> float | None:
        """What its CPU quota comes to."""
        if self.version == 2:
            words = _read(self.folder / "cpu.max").split()
            quota, period = words if len(words) == 2 else ("max", "")
        else:
            quota = _read(self.folder / "cpu.cfs_quota_us")
            period = _read(self.folder / "cpu.cfs_period_us")
        if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
            return None
        return int(quota) / int(period)

    def free(self) -> int | None:
        """Bytes below its limit. Above `memory.high` it is not killed, but slowed down for good."""
        names = ("memory.max", "memory.high") if self.version == 2 else ("memory.limit_in_bytes",)
        limits = [result for name in names if (result := self.number(name)) is not None]
        used = self.number("memory.current" if self.version == 2 else "memory.usage_in_bytes")
        stat = self.numbers("memory.stat")
        if self.version == 1 and "hierarchical_memory_limit" in stat:  # of those above, unseen ones
            limits.append(stat["hierarchical_memory_limit"])
        if not limits or used is None:
            return None
        prefix = "" if self.version == 2 else "total_"  # with the groups below
        cached = sum(stat.get(prefix + name, 0) for name in _RECLAIMABLE)
        return max(0, min(limits) - max(0, used - cached))


def usable_cores(root: Path = _SYSTEM, environment: Mapping[str, str] | None = None) -> int:
    """Cores that this process may keep busy.

    Args:
        root: where /proc and /sys are.
        environment: instead of the process's own.
    """
    environment = os.environ if environment is None else environment
    cores = float(os.cpu_count() or 1)
    if root == _SYSTEM and hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quotas = (group.cores() for group in _groups("cpu", root))
    scheduler = (_positive(environment.get(name, "")) for name in _GRANTED)
    limits = [limit for limit in (*quotas, *scheduler) if limit is not None]
    return max(1, math.ceil(min([cores, *limits])))


def library_threads(
    root: Path = _SYSTEM, environment: Mapping[str, str] | None = None
) -> int | None:
    """The most threads that torch and BLAS may have; None where the environment names a number."""
    environment = os.environ if environment is None else environment
    # "8,2" are numbers for nested loops; the first is for those that we start.
    if any(_positive(environment.get(name, "").partition(",")[0]) for name in _LIBRARIES):
        return None
    return usable_cores(root, environment)


@contextmanager
def torch_threads(count: int | None = None) -> Iterator[None]:
    """So many threads for torch's own loops; by default no more than there are cores for us.

    As before afterwards. torch counts the machine's cores and knows nothing of quotas. Of threads
    beyond `_MOST_THREADS`, and the cores, it gets none: it would end the process where the system
    refuses them.
    """
    torch = require("torch", "running a model")
    before = torch.get_num_threads()
    most = library_threads()
    threads = count or (before if most is None else min(before, most))
    threads = min(threads, max(_MOST_THREADS, os.cpu_count() or 1))
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def free_memory(root: Path = _SYSTEM) -> int:
    """Bytes that can be taken without swapping, and without being killed for it."""
    limits = [_system_memory(root)]
    limits += [free for group in _groups("memory", root) if (free := group.free()) is not None]
    return min(limits)


def _system_memory(root: Path) -> int:
    lines = _read(root / "proc/meminfo").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    words = values.get("MemAvailable", "").split()
    if words and words[0].isdecimal():
        return int(words[0]) * 1024
    # macOS: what is installed; what is free is the system's secret.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(controller: str, root: Path) -> Iterator[_Group]:
    """The groups that bind this process, from its own to the topmost that can be seen."""
    paths = dict(_memberships(root))
    for mount, inside, kinds in _mounts(root):
        version = 1 if kinds else 2
        key = controller if version == 1 else ""
        if (version == 1 and controller not in kinds) or key not in paths:
            continue
        top = root / mount.lstrip("/")
        group = top / _below(paths[key], inside)
        # Seen from inside a container our path may lead nowhere: then the top is our own.
        folder = group if group.is_dir() else top
        while True:
            yield _Group(folder, version)
            if folder == top:
                break
            folder = folder.parent


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Controller ("" for version 2) and path: `4:memory:/a/b`, `0::/a/b`."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for name in parts[1].split(","):
                yield name, parts[2]


def _mounts(root: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Where groups are mounted, what of their tree is, and which controllers; none in version 2."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount_part, _, kind = line.partition(" - ")
        left, right = mount_part.split(), kind.split()
        if len(left) < 5 or len(right) < 3 or right[0] not in ("cgroup", "cgroup2"):
            continue
        kinds = frozenset(right[2].split(",")) if right[0] == "cgroup" else frozenset()
        yield _unescaped(left[4]), _unescaped(left[3]), kinds


def _below(path: str, inside: str) -> str:
    """A path in the tree of groups, from the folder that is mounted."""
    parts, skipped = Path(path).parts[1:], Path(inside).parts[1:]
    if ".." in parts or parts[: len(skipped)] != skipped:
        return ""
    return "/".join(parts[len(skipped) :])


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _positive(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 and int(text) > 0 else None


def _read(path: Path) -> str:
    """A file's text; empty where there is none, or none that we may see."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


_NOWHERE = Path("/nonexistent")  # by convention: nothing can be written there
_MEMORY = Path("/dev/shm")


def home_folder() -> Path:
    """HOME, or what the system says, or what stands in for it; it may not be writable."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no such user
        return _stand_in()


def settle_home() -> None:
    """Name the stand-in to libraries that look for HOME: they would make a folder called `~`.

    And name a folder for temporary files to those that cannot even be imported without one, as
    torch: in a container that can be read alone, the one in memory.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = str(_MEMORY if os.access(_MEMORY, os.W_OK) else _NOWHERE)
        os.environ["TMPDIR"] = tempfile.tempdir
    try:
        Path.home()
    except RuntimeError:
        folder = _stand_in()
        os.environ["HOME"] = str(folder)
        fate = "caches are not kept" if folder == _NOWHERE else f"caches are kept in {folder}"
        say_once(f"there is no home folder: {fate}. Set HOME to choose one.")


def _stand_in() -> Path:
    try:
        folder = Path(tempfile.gettempdir()) / f"merge-cli-{os.getuid()}"
        if folder.parent == _MEMORY:  # caches would fill it
            return _NOWHERE
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:  # nothing can be written
        return _NOWHERE
    # Somebody else may have made it before us, to be believed.
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and status.st_uid == os.getuid() else _NOWHERE


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, flag: str) -> int:
    """Bytes.

    Raises:
        UsageError: not a size; shows the forms that are.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{flag}: '{text}' is not a size", hint="Write it like 5GB or 512MiB.")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_UNITS.get(unit) or _BINARY[unit]))


def show_size(size: float) -> str:
    """Three digits and a unit: 9.96 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def show_seconds(seconds: float) -> str:
    """0.42 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
