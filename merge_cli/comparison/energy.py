"""Energy, where the machine tells it: NVIDIA's total-energy counters and Intel's RAPL.

They count for the whole machine: what else runs on it is in the figure.
"""

from __future__ import annotations

from pathlib import Path

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
    found = {}
    for zone in sorted(_RAPL.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        try:
            used = int((zone / "energy_uj").read_text())
            wraps = int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):  # root's alone on most systems: then there is no figure
            continue
        found[zone.name] = (used / 1e6, wraps / 1e6)
    return found


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
