"""What training DAM costs: time against a plain backward pass, memory against one model.

    python scripts/bench_dam.py speed     # ratios of steps to forward and backward, in turns
    python scripts/bench_dam.py run       # CPU seconds of a default run on the zoo, by what for
    python scripts/bench_dam.py memory    # peaks of processes, sources on the host and on disk

Speed: the same model, batch and loss; plain is forward and backward with gradients dropped, DAM is
the same with three sources (and a base, as by default) projected, coefficients moved and weights
rewritten. Both are counted in CPU seconds of this process, on one thread. Rounds take turns, the
ratio is the median of the rounds' ratios.

Run: three models of zoo/ on their base, every option left out, with nothing in the cache. Seconds
are CPU seconds of one thread; silence is the longest time between two lines of progress.

Memory: private pages of a process of its own (sampled every few ms; pages of mapped files are the
system's to drop), less those before the student is loaded. The bound is 1.4 times the model, its
activations (measured on the graph) and the largest gradient; sources kept on the host are counted
apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import merge_cli
from merge_cli.dam.assembly import assemble
from merge_cli.dam.forward import Batch, Forward, LossSums
from merge_cli.dam.losses import DistillationLoss, TeacherTargets
from merge_cli.dam.models import find_targets
from merge_cli.engine.residency import Residency, SourceResidency
from merge_cli.evaluation.empty import empty_model
from merge_cli.evaluation.teachers import kept_predictions
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.training import Training

# Hidden width, feed-forward width, layers, vocabulary: deep and thin, so that neither activations
# nor one tensor hide the model.
SHAPES = {
    "tiny": (128, 384, 4, 1024),
    "zoo": (256, 640, 6, 4096),
    "small": (512, 1408, 8, 4096),
    "large": (1024, 2816, 20, 8192),
}
OBJECTIVE = DistillationLoss({"kl": 1.0})
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "columns, soup": {"granularity": "column", "form": "soup"},
}


def write_family(folder: Path, shape: str) -> Plan:
    """Three random models in bfloat16 and a recipe; the plan of their merge."""
    import transformers as hf
    from safetensors.torch import save_file

    width, inner, layers, vocabulary = SHAPES[shape]
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in hf.AutoModelForCausalLM.from_config(config).named_parameters()
        }
    for number, name in enumerate(["base", "a", "b", "c"]):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            key: (torch.randn(size, generator=generator) * 0.02 + (len(size) == 1)).bfloat16()
            for key, size in shapes.items()
        }
        place = folder / name
        place.mkdir()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        about = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        (place / "config.json").write_text(json.dumps(about))
    (folder / "data.jsonl").write_text('{"text": "not read here"}\n')
    (folder / "recipe.yaml").write_text(
        "merge_method: dam\nbase_model: base\nmodels:\n"
        + "".join(f"  - {{model: {name}, data: data.jsonl}}\n" for name in "abc")
    )
    return make_plan(load_recipe(folder / "recipe.yaml"))


def make_batch(rows: int, length: int, vocabulary: int, k: int = 64) -> Batch:
    """Random tokens with random teachers; every token counts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    counted = torch.ones(rows, length, dtype=torch.bool)
    counted[:, -1] = False
    n = int(counted.sum())
    parts = [
        kept_predictions(torch.randn(min(256, n - i), vocabulary, generator=generator), k, 2.0)
        for i in range(0, n, 256)
    ]
    kept = [torch.cat([part[j] for part in parts]) for j in range(3)]
    labels = ids[:, 1:].reshape(-1)
    targets = TeacherTargets(labels, torch.full((n,), 1 / n), *kept)
    return Batch(ids, torch.ones_like(ids), counted, targets)


def student_of(plan: Plan, residency: Residency, dtype: torch.dtype, **dials: Any) -> Any:
    training = Training(**dials).resolved(has_base=True)
    targets, problems = find_targets(plan, empty_model(plan), training)
    assert not problems
    return assemble(plan, targets, training, SourceResidency(residency, "bench", 0), "cpu", dtype)


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def bench_speed(shape: str, rows: int, length: int, rounds: int) -> None:
    import transformers as hf

    with tempfile.TemporaryDirectory() as name:
        plan = write_family(Path(name), shape)
        vocabulary = SHAPES[shape][3]
        batch = make_batch(rows, length, vocabulary)
        tokens = rows * length
        plain = hf.AutoModelForCausalLM.from_pretrained(Path(name) / "a", dtype=torch.float32)
        plain_forward = Forward(plain)
        for p in plain.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def run_plain() -> None:
            plain_forward.loss(batch, OBJECTIVE, LossSums()).backward()

        print(
            f"{shape}: {sum(p.numel() for p in plain.parameters()) / 1e6:.0f} M parameters, "
            f"{tokens} tokens a pass, {torch.get_num_threads()} thread(s)"
        )
        print("| options | residency | mode | plain CPU s | DAM CPU s | DAM / plain |")
        print("|---|---|---|---:|---:|---:|")
        for about, dials in OPTIONS.items():
            for residency, mode in (("host", "fused"), ("host", "two_pass"), ("disk", "fused")):
                student = student_of(plan, residency, torch.float32, **dials)
                step = _step(student, batch, mode)
                run_plain()
                step()
                pairs = [(seconds(run_plain), seconds(step)) for _ in range(rounds)]
                ratios = [ours / theirs for theirs, ours in pairs]
                theirs, ours = (statistics.median(p[i] for p in pairs) for i in (0, 1))
                print(
                    f"| {about} | {residency} | {mode} | {theirs:.3f} | {ours:.3f} | "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
                    flush=True,
                )
                student.close()


def _step(student: Any, batch: Batch, mode: str) -> Callable[[], None]:
    forward = Forward(student.net)

    def fused() -> None:
        student.last_backward(forward.loss(batch, OBJECTIVE, LossSums()), 1e-3)

    def two_pass() -> None:
        forward.loss(batch, OBJECTIVE, LossSums()).backward()
        student.update(1e-3)

    return fused if mode == "fused" else two_pass


def bench_run(training: dict[str, Any]) -> None:
    """Stages of a run in this process: a stage's seconds end where its next line is told."""
    zoo = Path(__file__).resolve().parents[1] / "zoo"
    with tempfile.TemporaryDirectory() as name:
        os.environ["MERGE_CLI_CACHE"] = str(Path(name) / "cache")
        names = ("japanese", "math", "code")
        document = {
            "merge_method": "dam",
            "base_model": str(zoo / "base"),
            "models": [
                {"model": str(zoo / n), "data": str(zoo / "data" / f"{n}.train.jsonl")}
                for n in names
            ],
            "training": training,
        }
        path = Path(name) / "recipe.yaml"
        path.write_text(json.dumps(document))
        spent: dict[str, float] = {}
        silence: dict[str, float] = {}
        last = [time.process_time()]

        def tell(progress: merge_cli.Progress) -> None:
            cpu, stage = time.process_time(), progress.stage
            if stage == "measure" and progress.note.endswith("steps"):
                stage = "measure while training"
            spent[stage] = spent.get(stage, 0.0) + cpu - last[0]
            silence[stage] = max(silence.get(stage, 0.0), cpu - last[0])
            last[0] = cpu

        options = merge_cli.MergeOptions(device="cpu", threads=torch.get_num_threads())
        result = merge_cli.merge(path, Path(name) / "out", options=options, on_progress=tell)
        cost = result.report["training"]["cost"]
    print("| stage | CPU s | longest silence |")
    print("|---|---:|---:|")
    for stage, used in spent.items():
        print(f"| {stage} | {used:.1f} | {silence[stage]:.1f} |")
    print(f"| all | {sum(spent.values()):.1f} | {max(silence.values()):.1f} |")
    share = spent.get("measure while training", 0.0) / spent["train"]
    print(f"\n{cost['tokens']:,} tokens; measuring is {share:.0%} of training")


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is known on Linux alone")


class Peak:
    """The most private memory that was seen while a block ran."""

    def __enter__(self) -> Peak:
        self.bytes, self._on = private_bytes(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.bytes = max(self.bytes, private_bytes())
            time.sleep(0.003)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def measure_memory(folder: Path, shape: str, residency: str, rows: int, length: int) -> None:
    """In a process of its own: prints what was seen as JSON."""
    torch.set_num_threads(1)
    plan = make_plan(load_recipe(folder / "recipe.yaml"))
    batch = make_batch(rows, length, SHAPES[shape][3])
    before = private_bytes()
    student = student_of(plan, residency, torch.float32)
    forward = Forward(student.net)
    parameters = {p.untyped_storage().data_ptr() for p in student.net.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward.loss(batch, OBJECTIVE, LossSums())
    student.last_backward(loss, 1e-3)
    with Peak() as peak:
        for _ in range(3):
            student.last_backward(forward.loss(batch, OBJECTIVE, LossSums()), 1e-3)
    print(
        json.dumps(
            {
                "model": sum(p.nbytes for p in student.net.parameters()),
                "sources": sum(t.nbytes for t in student.sources._kept.values()),
                "activations": sum(saved.values()),
                "largest": max(p.nbytes for p in student.net.parameters()),
                "peak": peak.bytes - before,
            }
        )
    )


def bench_memory(shape: str, rows: int, length: int) -> None:
    mb = 1e6
    print(
        "| residency | model MB | activations | largest gradient | bound | sources on the host | "
        "peak without them | peak / bound |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        write_family(Path(name), shape)
        for residency in ("disk", "host"):
            command = [
                sys.executable,
                __file__,
                "memory",
                "--shape",
                shape,
                "--rows",
                str(rows),
                "--length",
                str(length),
                "--in",
                name,
                "--residency",
                residency,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            bound = 1.4 * found["model"] + found["activations"] + found["largest"]
            peak = found["peak"] - found["sources"]
            cells = [
                found["model"],
                found["activations"],
                found["largest"],
                bound,
                found["sources"],
                peak,
            ]
            shown = " | ".join(f"{value / mb:,.0f}" for value in cells)
            print(f"| {residency} | {shown} | {peak / bound:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("speed", "run", "memory"))
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--training", default="{}", help="options of `training:`, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--residency", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "run":
        bench_run(json.loads(given.training))
    elif given.what == "speed":
        bench_speed(given.shape or "small", given.rows or 8, given.length, given.rounds)
    elif given.folder is None:
        bench_memory(given.shape or "large", given.rows or 1, given.length)
    else:
        measure_memory(given.folder, given.shape, given.residency, given.rows, given.length)


if __name__ == "__main__":
    main()
