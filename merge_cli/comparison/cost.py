"""What a merge costs, measured: the command runs as a process of its own.

So that its wall time and peak memory are those that its user would see, and nothing that another
merge or an evaluation left in memory counts. Every attempt is noted in a file: a merge that was
interrupted and resumed costs the sum of its attempts.

Energy, where the machine tells it: NVIDIA's total-energy counters and Intel's RAPL.

They count for the whole machine: what else runs on it is in the figure.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_cli.engine.output import OutputWorkspace
from merge_cli.errors import Interrupted, MergeCliError
from merge_cli.system.processes import child
from merge_cli.system.raw_io import replace_file, write_error
from merge_cli.system.records import read_lines, seal
from merge_cli.system.untrusted import read_mapping


@dataclass(frozen=True)
class MergeCost:
    """What it took to make a merge.

    Attributes:
        seconds: wall time of the command, all attempts together.
        tokens, forward_passes, backward_passes: of what learns, searches or gathers; 0 otherwise.
        peak_rss, peak_vram: bytes; the GPU's is None on a CPU.
        joules: what the machine's meters say, or None where it has none that may be read.
    """

    seconds: float
    tokens: int
    forward_passes: int
    backward_passes: int
    peak_rss: int
    peak_vram: int | None
    joules: float | None


class CostLog:
    """The attempts so far, in DIR/costs.jsonl: sealed lines, up to the first that does not hold."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes() if path.exists() else b""
        self._attempts, length = read_lines(content)
        if length < len(content):  # killed while writing
            self._rewrite()

    def note(self, merge: str, seconds: float, joules: float | None, *, done: bool) -> None:
        """Add one attempt at a merge."""
        attempt = {"merge": merge, "seconds": round(seconds, 3), "joules": joules, "done": done}
        self._attempts.append(attempt)
        try:
            with self._path.open("ab") as file:
                file.write(seal(attempt))
        except OSError as error:
            raise write_error(error, self._path) from error

    def forget(self, merge: str) -> None:
        """The merge starts over: what was spent on it before counts no longer."""
        kept = [attempt for attempt in self._attempts if attempt["merge"] != merge]
        if len(kept) < len(self._attempts):
            self._attempts = kept
            self._rewrite()

    def cost(self, merge: str, folder: Path) -> MergeCost:
        """What a finished merge has taken, from its attempts and its report."""
        own = [attempt for attempt in self._attempts if attempt["merge"] == merge]
        whole = read_mapping(folder / "merge_report.json", merge)
        report, learning = whole["cost"], whole.get("training", {}).get("cost", {})
        searching = whole.get("search", {}).get("cost", {})
        gathering = whole.get("gathered", {}).get("cost", {})
        energies = [attempt["joules"] for attempt in own]
        known = bool(energies) and None not in energies
        return MergeCost(
            # Without a note (somebody removed the file), the loop's own time is what is known.
            seconds=sum(a["seconds"] for a in own) if own else report["seconds"],
            tokens=sum(c.get("tokens", 0) for c in (learning, searching, gathering)),
            forward_passes=learning.get("passes", 0)
            + learning.get("held_out_passes", 0)
            + searching.get("forward_passes", 0)
            + gathering.get("forward_passes", 0),
            backward_passes=learning.get("passes", 0) + gathering.get("backward_passes", 0),
            peak_rss=max(
                report["peak_rss"], *(c.get("peak_rss", 0) for c in (learning, searching))
            ),
            peak_vram=max(
                (report["peak_vram"], learning.get("peak_vram"), searching.get("peak_vram")),
                key=lambda v: v or 0,
            ),
            joules=sum(energies) if known else None,
        )

    def _rewrite(self) -> None:
        replace_file(self._path, b"".join(map(seal, self._attempts)))


def run_merge(recipe: Path, out: Path, options: Sequence[str], ledger: CostLog) -> None:
    """`merge-cli run RECIPE OUT`, its progress on our stderr.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the merge has closed its journal.
        ResourceError: somebody else is merging there.
        MergeCliError: it failed; it has said why, and the exit code is its.
    """
    with OutputWorkspace(out):  # waits for what a comparison that was killed has left behind
        if out.exists():
            return
        begun = out.with_name(f"{out.name}.partial").exists()
    if not begun:
        ledger.forget(out.name)
    command = ["run", str(recipe), str(out), "--json", *options]
    meter, began = EnergyMeter(), time.monotonic()
    with child("merge_cli", command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # In a terminal it was told, too; from a batch system only we were.
            process.send_signal(signal.SIGINT)
            code = 130
            process.wait()
    done = code == 0 and out.exists()
    ledger.note(out.name, time.monotonic() - began, meter.joules(), done=done)
    if code == 130:
        raise Interrupted("stopped", where=str(recipe))
    if not done:
        error = MergeCliError("the merge failed, as said above", where=str(recipe))
        error.exit_code = code if 0 < code < 128 else 1
        raise error


_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Reads every meter now, and again in `joules`."""

    def __init__(self) -> None:
        self._began = {**_packages(), **_gpus()}

    def joules(self) -> float | None:
        """What all meters have counted since; None where there is none that may be read."""
        ended = {**_packages(), **_gpus()}
        if not self._began or ended.keys() != self._began.keys():
            return None
        return sum(_since(self._began[meter], ended[meter]) for meter in ended)


Reading = tuple[float, float]  # joules so far, and at how many the counter starts again (0: never)


def _since(began: Reading, ended: Reading) -> float:
    difference = ended[0] - began[0]
    return difference if difference >= 0 else difference + ended[1]


def _packages() -> dict[str, Reading]:
    """CPU packages (`intel-rapl:0`; their parts `intel-rapl:0:1` are in them)."""
    result = {}
    for zone in sorted(_RAPL.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            used = int((zone / "energy_uj").read_text())
            wraps = int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):  # root's alone on most systems: then there is no figure
            continue
        result[zone.name] = (used / 1e6, wraps / 1e6)
    return result


def _gpus() -> dict[str, Reading]:
    """NVIDIA devices, if NVML's bindings are installed and a driver answers."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {
            f"gpu {i}": (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
            for i, handle in enumerate(handles)
        }
    except pynvml.NVMLError:  # no driver, or a device that does not count
        return {}
