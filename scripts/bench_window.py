"""Averages of few and of many checkpoints: memory, and CPU time for each byte that is read.

    python scripts/bench_window.py --work WORK --counts 3,16,40 --size 100

Each merge is a process of its own, with one thread. The checkpoints are made once, of `--size` MB
of bfloat16 in layers like Llama's, and stay under --work. With --sweep N, N schedules of each
window are merged in one pass. Prints a Markdown table: the peak of the
process, what the plan foresaw, CPU seconds for each GB that is read, and the ratio of that to the
first row's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

RUN = [sys.executable, "-m", "merge_cli"]
WIDTH = 512


def make_run(folder: Path, count: int, megabytes: int, experts: int) -> None:
    """Write checkpoints that are not there yet; with experts, tiny ones in each layer besides."""
    import torch
    from safetensors.torch import save_file

    layers = max(1, round(megabytes * 1e6 / 2 / (4 * WIDTH * WIDTH + 3 * 4 * WIDTH * WIDTH)))
    shapes = {"q_proj": (1, 1), "k_proj": (1, 1), "v_proj": (1, 1), "o_proj": (1, 1)}
    shapes |= {"up_proj": (4, 1), "gate_proj": (4, 1), "down_proj": (1, 4)}
    for step in range(1, count + 1):
        target = folder / f"checkpoint-{step}"
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(step)
        tensors = {
            f"model.layers.{layer}.{name}.weight": torch.randn(
                WIDTH * tall, WIDTH * wide, generator=generator
            ).bfloat16()
            for layer in range(layers)
            for name, (tall, wide) in shapes.items()
        }
        tensors |= {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": torch.ones(4, 4).bfloat16()
            for layer in range(layers)
            for expert in range(experts)
            for name in ("up_proj", "gate_proj", "down_proj")
        }
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))


def measure(
    folder: Path, count: int, sweep: int, flags: list[str]
) -> tuple[float, float, float, float]:
    """Peak, foreseen peak (MB), CPU seconds, GB read."""
    recipe, out = folder / f"last-{count}.yaml", folder / "out"
    window = f"checkpoints: {{from: ., last: {count}}}"
    text = f"merge_method: checkpoint_average\n{window}\nschedule: minus_sqrt\n"
    decays = [(number + 1) / (sweep + 1) for number in range(sweep)]
    variants = (f"  ema-{decay:.3f}: {{schedule: {{ema: {decay}}}}}\n" for decay in decays)
    recipe.write_text(text + (f"sweep:\n{''.join(variants)}" if sweep else ""))
    planned = subprocess.run(
        [*RUN, "plan", str(recipe), "--json", "--threads", "1"], check=True, stdout=subprocess.PIPE
    )
    plan = json.loads(planned.stdout)
    command = [*RUN, "run", str(recipe), str(out), "--overwrite", "--quiet", "--threads", "1"]
    process = subprocess.Popen([*command, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the merge of {count} checkpoints ended with {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return usage.ru_maxrss / 1e3, plan["peak_memory"] / 1e6, cpu, plan["bytes_read"] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--counts", default="3,16,40")
    parser.add_argument("--size", type=int, default=100, help="MB of a checkpoint")
    parser.add_argument("--experts", type=int, default=0, help="of each layer, of 4 x 4 elements")
    parser.add_argument("--sweep", type=int, default=0, help="schedules in one pass; 0: one")
    parser.add_argument("--make", action="store_true", help="only write the checkpoints")
    parser.add_argument("flags", nargs="*", help="further flags of `merge-cli run`, after --")
    arguments = parser.parse_args()
    counts = [int(word) for word in arguments.counts.split(",")]
    if arguments.make:
        make_run(arguments.work, max(counts), arguments.size, arguments.experts)
        return
    # In another process: on Linux a child's peak starts from its parent's, and torch is large.
    subprocess.run([sys.executable, sys.argv[0], "--make", *sys.argv[1:]], check=True)
    measure(arguments.work, counts[0], arguments.sweep, arguments.flags)  # compiles kernels
    print("| checkpoints | read | peak | foreseen | CPU s | CPU s per GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    first = 0.0
    for count in counts:
        peak, foreseen, cpu, read = measure(arguments.work, count, arguments.sweep, arguments.flags)
        first = first or cpu / read
        print(
            f"| {count} | {read:.2f} GB | {peak:.0f} MB | {foreseen:.0f} MB | {cpu:.1f} "
            f"| {cpu / read:.2f} | {cpu / read / first:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
