"""Peak memory of merges: under a bound, and not growing with the model.

    python scripts/bench_memory.py [--size 1.5B] [--work FOLDER] [--methods soup,ties]

Makes two synthetic families (the size's own layers, and a third of them), merges each in a process
of its own, and prints the operating system's figure for the process's peak, the plan's estimate,
and the ratio between three times the layers and one. Time is shown beside reading and writing the
same bytes with plain pread and pwrite in the same run. Inputs are read once beforehand, so that the
page cache is warm for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from synthetic import SIZES

METHODS: dict[str, dict[str, object]] = {
    "soup": {},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"density": 0.5},
    "dare": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "slerp": {"t": 0.4},
    "passthrough": {},
}
_BUFFER = 8 * 2**20


def write_recipe(folder: Path, method: str) -> Path:
    """A recipe for the method over the family in `folder`."""
    names = sorted(p.name for p in folder.glob("model*"))
    used = names[: {"slerp": 2, "passthrough": 1}.get(method, 3)]
    recipe = {"merge_method": method, "models": used, "parameters": METHODS[method]}
    if method not in ("soup", "slerp", "passthrough"):
        recipe["base_model"] = "base"
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(recipe: Path, out: Path, flags: list[str]) -> tuple[float, int, dict[str, object]]:
    """Merge in a process of its own: wall seconds, peak resident bytes, the report."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "merge_cli", "run", str(recipe), str(out), "-q", *flags]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    report = json.loads((out / "merge_report.json").read_text())
    return seconds, usage.ru_maxrss * unit, report


def floor(recipe: Path, out: Path, written: int) -> float:
    """Seconds to read the recipe's inputs and write as many bytes as the merge did, plainly."""
    document = yaml.safe_load(recipe.read_text())
    names = [*document["models"], *([document["base_model"]] if "base_model" in document else [])]
    buffer = memoryview(bytearray(_BUFFER))
    began = time.perf_counter()
    for name in names:
        for file in sorted((recipe.parent / name).glob("*.safetensors")):
            fd = os.open(file, os.O_RDONLY)
            offset = 0
            while count := os.preadv(fd, [buffer], offset):
                offset += count
            os.close(fd)
    out.parent.mkdir(exist_ok=True)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for offset in range(0, written, _BUFFER):
        os.pwrite(fd, buffer[: min(_BUFFER, written - offset)], offset)
    os.close(fd)
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--max-memory", default="1.25GB")
    given = parser.parse_args()
    whole = SIZES[given.size]
    families = {"a third": whole["layers"] // 3, "whole": whole["layers"] // 3 * 3}
    for layers in families.values():
        folder = given.work / f"{given.size}-{layers}"
        if not (folder / "done").exists():
            # In a process of its own: a child's peak would start from this one's.
            script = Path(__file__).with_name("synthetic.py")
            flags = ["--size", given.size, "--layers", str(layers)]
            subprocess.run([sys.executable, str(script), str(folder), *flags], check=True)
            (folder / "done").touch()
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
          f"{given.size} Llama of {families['whole']} layers and one of {families['a third']}, "
          "3 sources, bfloat16, warm cache")  # fmt: skip
    print(f"merge-cli run RECIPE OUT --max-memory {given.max_memory}\n")
    print("| method | peak MB, a third of the layers | peak MB, all layers | ratio "
          "| seconds | plain read and write | times the floor |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in given.methods.split(","):
        peaks = {}
        for label, layers in families.items():
            recipe = write_recipe(given.work / f"{given.size}-{layers}", method)
            floor(recipe, given.work / "floor", 0)  # warms the cache
            flags = ["--max-memory", given.max_memory]
            seconds, peaks[label], report = run(recipe, given.work / "out", flags)
        cost = report["cost"]
        assert isinstance(cost, dict)
        plain = floor(recipe, given.work / "floor", cost["bytes_written"])
        print(f"| {method} | {peaks['a third'] / 1e6:.0f} | {peaks['whole'] / 1e6:.0f} "
              f"| {peaks['whole'] / peaks['a third']:.2f} | {seconds:.1f} | {plain:.1f} "
              f"| {seconds / plain:.1f} |", flush=True)  # fmt: skip
    shutil.rmtree(given.work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
