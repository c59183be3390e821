"""Measuring what a merge costs: time, memory, energy of the command in a separate process.

So wall time and peak memory are those that a user would see, without what another merge or an
evaluation has left in memory. Each attempt is recorded in a file: a merge that was interrupted and
resumed costs the sum of its attempts. Energy is that of the whole machine, other programs included,
from NVIDIA's counters and Intel's RAPL.
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

COSTS = "costs.jsonl"  # in the comparison's folder
_RAPL = Path("/sys/class/powercap")
Reading = tuple[float, float]  # joules so far, and where the counter wraps (0: never)


@dataclass(frozen=True)
class MergeCost:
    """The cost of a merge.

    Attributes:
        seconds: wall time of the command, all attempts together.
        tokens, forward_passes, backward_passes: of training, search or calibration; 0 otherwise.
        peak_rss, peak_vram: bytes; the GPU's is None on a CPU.
        joules: by the machine's meters; None where none can be read.
    """

    seconds: float
    tokens: int
    forward_passes: int
    backward_passes: int
    peak_rss: int
    peak_vram: int | None
    joules: float | None


class CostLog:
    """The attempts so far, in DIR/costs.jsonl: sealed lines, up to the first damaged one."""

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
        """Remove a merge's attempts, because the merge starts again."""
        remaining = [attempt for attempt in self._attempts if attempt["merge"] != merge]
        if len(remaining) < len(self._attempts):
            self._attempts = remaining
            self._rewrite()

    def cost(self, merge: str, folder: Path) -> MergeCost:
        """The cost of a finished merge, from its attempts and its report."""
        attempts = [attempt for attempt in self._attempts if attempt["merge"] == merge]
        document = read_mapping(folder / "merge_report.json", merge)
        merge_cost, learning = document["cost"], document.get("training", {}).get("cost", {})
        searching = document.get("search", {}).get("cost", {})
        calibration = document.get("gathered", {}).get("cost", {})
        energies = [attempt["joules"] for attempt in attempts]
        metered = bool(energies) and None not in energies
        return MergeCost(
            # Without attempts (the file was removed), there is only the time in the report.
            seconds=sum(a["seconds"] for a in attempts) if attempts else merge_cost["seconds"],
            tokens=sum(c.get("tokens", 0) for c in (learning, searching, calibration)),
            forward_passes=learning.get("passes", 0)
            + learning.get("held_out_passes", 0)
            + searching.get("forward_passes", 0)
            + calibration.get("forward_passes", 0),
            backward_passes=learning.get("passes", 0) + calibration.get("backward_passes", 0),
            peak_rss=max(
                merge_cost["peak_rss"], *(c.get("peak_rss", 0) for c in (learning, searching))
            ),
            peak_vram=max(
                (merge_cost["peak_vram"], learning.get("peak_vram"), searching.get("peak_vram")),
                key=lambda v: v or 0,
            ),
            joules=sum(energies) if metered else None,
        )

    def _rewrite(self) -> None:
        replace_file(self._path, b"".join(map(seal, self._attempts)))


def run_merge(recipe: Path, out: Path, options: Sequence[str], cost_log: CostLog) -> None:
    """Run `merge-cli run RECIPE OUT`, with its progress on our stderr.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the merge has closed its journal.
        ResourceError: another process is merging there.
        MergeCliError: the merge failed, with its exit code; it has printed the reason.
    """
    with OutputWorkspace(out):  # waits for a merge that a killed comparison has left running
        if out.exists():
            return
        is_begun = out.with_name(f"{out.name}.partial").exists()
    if not is_begun:
        cost_log.forget(out.name)
    command = ["run", str(recipe), str(out), "--json", *options]
    meter, start = EnergyMeter(), time.monotonic()
    with child("merge_cli", command, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # A terminal interrupts both processes; a batch system only this one.
            process.send_signal(signal.SIGINT)
            code = 130
            process.wait()
    done = code == 0 and out.exists()
    cost_log.note(out.name, time.monotonic() - start, meter.joules(), done=done)
    if code == 130:
        raise Interrupted("stopped", where=str(recipe))
    if not done:
        error = MergeCliError("the merge failed, as said above", where=str(recipe))
        error.exit_code = code if 0 < code < 128 else 1
        raise error


class EnergyMeter:
    """Measures energy from its creation to `joules`."""

    def __init__(self) -> None:
        self._began = {**_packages(), **_gpus()}

    def joules(self) -> float | None:
        """Joules by all meters since the start; None where none can be read."""
        ended = {**_packages(), **_gpus()}
        if not self._began or ended.keys() != self._began.keys():
            return None
        return sum(_difference(self._began[meter], ended[meter]) for meter in ended)


def _difference(began: Reading, ended: Reading) -> float:
    difference = ended[0] - began[0]
    return difference if difference >= 0 else difference + ended[1]


def _packages() -> dict[str, Reading]:
    """CPU packages (`intel-rapl:0`), which include their parts (`intel-rapl:0:1`)."""
    readings = {}
    for zone in sorted(_RAPL.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            energy = int((zone / "energy_uj").read_text())
            maximum = int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):  # only root may read it on most systems
            continue
        readings[zone.name] = (energy / 1e6, maximum / 1e6)
    return readings


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
