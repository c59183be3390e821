"""As fast as C? Every compiled primitive against its twin in plain C, one thread, taking turns.

    python scripts/bench_kernels.py                             # all of them, Markdown
    python scripts/bench_kernels.py merge count --rounds 9      # those whose name has such a part
    python scripts/bench_kernels.py --instructions              # under valgrind: instructions, too
    python scripts/bench_kernels.py --json kernels.json

The twins are bench_kernels.c and bench_codes.c, built here by gcc -O3 -march=native
-ffp-contract=off into --work. A kernel and its twin get copies of the same arrays; what they return
and write is compared, bit for bit but for the sums whose order is free (`~` in the table). Then
they take turns, in the opposite order every second round. Times are CPU seconds of the thread:
other work on the machine hardly moves them. ns and share are of the median round, "ours / C" is the
median of the rounds' ratios. The share of bandwidth is bytes read and written over those of a large
copy, measured in this run; blocks lie in the L3 cache, so that it may be above 1. Primitives
without a twin are listed.

Instructions are counted by callgrind in a process of its own, which knows no AVX-512: kernels and
twins are compiled for AVX2 there, and without valgrind and its headers the column stays empty.

Exit code 1: a kernel and its twin differ.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import machine, machine_line, markdown

from merge_cli.kernels import compiled
from merge_cli.kernels.fused import stored_starts
from merge_cli.kernels.reduce import BLOCK_MULTIPLE

SCRIPTS = Path(__file__).resolve().parent
F32, U32 = np.float32, np.uint32
_FLAGS = ["-O3", "-ffp-contract=off", "-shared", "-fPIC"]
_SECONDS = 0.1  # of each measurement
_UNMEASURED = ("read_pieces",)  # system calls, which are the same from C
_CALLGRIND = """
#include <valgrind/callgrind.h>
void count_on(void) { CALLGRIND_ZERO_STATS; CALLGRIND_TOGGLE_COLLECT; }
void count_off(const char *name) { CALLGRIND_TOGGLE_COLLECT; CALLGRIND_DUMP_STATS_AT(name); }
"""


@dataclass(frozen=True)
class Case:
    """One primitive with its arguments.

    Attributes:
        elements: of the result (or of the input, where the result is a number).
        moved: bytes read and written for each element.
        exact: the same bits; else the order of its sums is free.
        used_up: indexes of arguments that are scratch, and hold anything afterwards.
    """

    name: str
    kernel: str
    arguments: tuple[Any, ...]
    elements: int
    moved: float
    exact: bool = True
    used_up: tuple[int, ...] = ()
    note: str = ""


def cases(size: int) -> list[Case]:
    """Everything in kernels.compiled, as a merge of three models in blocks of `size` calls it."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal(size) * 0.02).astype(F32)
    models = base + (rng.standard_normal((3, size)) * 0.0005).astype(F32)
    halves = (np.stack([base, *models]).view(U32) >> U32(16)).astype(np.uint16)
    deltas = np.ascontiguousarray(models - base)
    row, weights = deltas[0], np.array([0.5, 1.0, 0.25], F32)
    float16 = base.astype(np.float16).view(np.uint16)
    out, out16, out3 = np.empty(size, F32), np.empty(size, np.uint16), np.empty((3, size), F32)
    middle = np.sort(np.abs(row).view(U32))
    low, high = middle[int(0.49 * size)], middle[int(0.51 * size)]
    shift = U32(max(0, int(high - low).bit_length() - 19))
    half = middle[size // 2]
    cut = np.full(3, half, U32)
    masks = np.array([[1, 2, 2**31, 0], [3, 4, 2**31, 0], [5, 6, 2**31, 0]], U32)
    runs = np.empty(-(-size // BLOCK_MULTIPLE))
    counts = np.zeros(2**19, np.int32)
    pairs = [np.zeros((3, 3), np.int64) for _ in range(4)]
    relations = np.ascontiguousarray(np.stack([base, *deltas]))
    few = np.ascontiguousarray(middle[:: size // 8][:8])
    numbers = np.zeros((2, 8), np.int64)
    rank = 16
    columns = min(size, 4096)
    left = (rng.standard_normal((size // columns, rank))).astype(F32)
    right = rng.standard_normal((rank, columns)).astype(F32)
    table = base[: size // columns * columns].reshape(-1, columns)
    few_of_many = rng.integers(0, 500, size).astype(U32)
    sparse = np.where(rng.random(size) < 0.02, 3, 0).astype(np.int32)
    square = rng.standard_normal((64, 512))
    own = square @ square.T
    diagonal, off = np.abs(rng.standard_normal(64)), rng.standard_normal(64)

    def ready(name: str, *arguments: Any, moved: float, **more: Any) -> Case:
        elements = more.pop("elements", size)
        return Case(more.pop("label", name), name, arguments, elements, moved, **more)

    found = [
        ready("decode_bf16", halves, out3, out, True, True, moved=24),
        ready("decode_f16", float16, out, moved=6),
        ready("encode_bf16", base, out16, moved=6),
        ready("encode_f16", base, out16, moved=6),
        ready("non_finite", base, moved=4),
        ready("weighted_sum", models, weights, out, moved=16),
        ready("add_scaled", base, F32(0.4), row.copy(), moved=12),
        ready("dot_runs", base, row, BLOCK_MULTIPLE, runs, moved=8),
        ready("absolute_runs", base, BLOCK_MULTIPLE, runs, moved=4),
        ready("add_low_rank", left, right, F32(0.5), table, moved=8, elements=table.size,
              note=f"rank {rank}"),
        ready("count_range", row, low, high, shift, counts, moved=4),
        ready("count_keys", row, few, *numbers, moved=4, note="8 keys"),
        ready("trim", deltas, cut, np.zeros(3, np.int64), out3, moved=24),
        ready("count_kept", row, half, 0, moved=4),
        ready("distinct_keys", few_of_many, U32(0), U32(7), np.empty(8, U32), moved=4),
        ready("find_tie", row, U32(2**31 - 1), 1, moved=4),
        ready("not_empty", sparse, np.empty(size, np.int32), np.empty(size, np.int64), moved=4),
        ready("kth_largest", deltas, np.full(3, size // 2), np.empty(3, np.int64),
              np.empty(3, np.int64), moved=24),
        ready("drop", deltas, masks[:, :3].copy(), U32(0), np.full(3, 2, F32), out3, moved=24),
        ready("count_masked", size, U32(1), U32(2), U32(0), U32(2**31), moved=0),
        ready("disjoint_mean", deltas, weights, True, 1, F32(1), F32(0), out, moved=16),
        ready("gram", deltas, np.zeros((3, 3)), moved=12, exact=False),
        ready("quick_change", base, models[0], moved=8, exact=False),
        ready("count_signs", deltas, *pairs[:2], moved=12),
        ready("count_relations", relations, cut, *pairs, np.zeros(3, np.int64),
              np.zeros(2, np.int64), moved=16),
        ready("own_products", square, np.empty((64, 64)), moved=8, elements=square.size,
              exact=False, note="64 x 512, float64"),
        ready("tridiagonal", own, np.empty(64), np.empty(64), np.empty((0, 64)), moved=8,
              elements=own.size, exact=False, used_up=(0,), note="64 x 64, float64"),
        ready("eigenvalues", diagonal, off, np.empty((64, 0)), moved=8, elements=64, exact=False,
              note="64, float64"),
    ]  # fmt: skip
    found += code_cases(base[: size // 256 * 256])
    return found + stored_cases(halves, base, weights, masks, cut, (low, high, shift))


def without_twin() -> list[str]:
    """Primitives that no case measures."""
    measured = {case.kernel for case in cases(65_536)}
    kernels = {n for n in compiled.__all__ if isinstance(getattr(compiled, n), compiled.Kernel)}
    return sorted(kernels - measured - {*_UNMEASURED})


_BLOCKS = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q2_k": 84, "q3_k": 110,
           "q4_k": 144, "q5_k": 176, "q6_k": 210}  # bytes of a block  # fmt: skip


def code_cases(values: Any) -> list[Case]:
    """Codes of few bits to numbers, and back."""
    rng, size = np.random.default_rng(1), len(values)
    out = np.empty(size, F32)

    def noise(*shape: int) -> Any:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def ready(name: str, *arguments: Any, moved: float, note: str = "") -> Case:
        return Case(name, name, arguments, size, moved, note=note)

    rows, narrow = values.reshape(-1, 256), values.reshape(-1, 32)
    blocks = np.abs(rows).max(1, keepdims=True) / F32(448)
    scales = np.abs(narrow).max(1) / F32(6)
    flat, wide = np.empty(len(narrow), F32), np.empty((len(rows), 1), F32)
    bytes_of, halves = np.empty(rows.shape, np.uint8), np.empty((len(narrow), 16), np.uint8)
    steps = (narrow.max(1) - narrow.min(1)) / F32(15)
    found = [
        ready("block_largest", rows, 1, 256, wide, moved=4, note="blocks of 256"),
        ready("encode_e4m3", rows, 1, 256, blocks, bytes_of, moved=5, note="blocks of 256"),
        ready("encode_e5m2", rows, 1, 256, blocks, bytes_of, moved=5, note="blocks of 256"),
        ready("group_extremes", narrow, flat, flat.copy(), moved=4, note="groups of 32"),
        ready("encode_e2m1", narrow, scales, halves, moved=4.5, note="groups of 32"),
        ready("encode_int4", narrow, scales, np.zeros_like(scales), halves, moved=4.5,
              note="groups of 32"),
        ready("encode_affine", narrow, steps, narrow.min(1), F32(15), bytes_of.reshape(-1, 32),
              moved=5, note="groups of 32"),
        ready("look_up", values[:256].copy(), noise(size), out, moved=5, note="float32"),
        ready("spread_bytes", noise(size // 2), 4, np.empty(size, np.uint8), moved=1.5,
              note="4 bits"),
        ready("scale_groups", rows.copy(), np.ones((len(rows), 8), F32), moved=8,
              note="groups of 32"),
    ]  # fmt: skip
    for name, width in _BLOCKS.items():
        elements = 256 if name.endswith("k") else 32
        # Bytes so small are finite numbers wherever a block has a float16.
        raw = noise(size // elements, width) % 0x30
        numbers = out.reshape(-1, elements)
        found.append(ready(name, raw, numbers, moved=4 + width / elements))
    return found + turned_cases(size, out)


def turned_cases(size: int, out: Any) -> list[Case]:
    """Strips of GPTQ, AWQ and MXFP4: 4,096 inputs, or 2,880 outputs, of which a block is cut."""
    rng = np.random.default_rng(2)
    rows = max(8, size // 4096 // 8 * 8)
    numbers = out[: rows * 4096]
    words = rng.integers(0, 2**32, (512, rows), dtype=np.uint64).astype(U32).reshape(-1)
    eights = rng.integers(0, 2**32, (4096, rows // 8), dtype=np.uint64).astype(U32).reshape(-1)
    zeros, scales = np.full((rows, 32), 8, F32), rng.random((rows, 32), F32)
    shifts = np.array((0, 16, 4, 20, 8, 24, 12, 28), U32)
    width = 2880
    high = max(2, size // width // 2 * 2)
    raw = rng.integers(0, 256, width * high // 2, dtype=np.uint8)
    exponents = rng.integers(115, 122, (width, -(-high // 32)), dtype=np.uint8)
    columns = out[: high * width]
    groups = zeros, scales, 128
    return [
        Case("turned_words", "turned_words",
             (words, rows, 512, 4, *groups, 0, numbers), len(numbers), 4.5),
        Case("turned_eights", "turned_eights",
             (eights, rows // 8, 4096, shifts, *groups, 0, 0, numbers), len(numbers), 4.5),
        Case("turned_fp4", "turned_fp4",
             (raw, high // 2, width, high // 2, exponents, 32, 0, high, 0, columns), len(columns),
             4.5),
    ]  # fmt: skip


def stored_cases(
    halves: Any, base: Any, weights: Any, masks: Any, cut: Any, bracket: Sequence[Any]
) -> list[Case]:
    """The loops from stored bytes: base and three models in bfloat16."""
    size = len(base)
    starts, kinds = stored_starts([size] * 4, ["BF16"] * 4)
    stored = np.zeros(int(starts[-1]), np.uint8)
    for start, row in zip(starts, halves, strict=False):
        stored[start : start + 2 * size] = row.view(np.uint8)
    based = stored, starts[:-1], kinds, size
    alone = stored, starts[:3], kinds[:3], size
    out = np.empty(2 * size, np.uint8)
    ones, none, no_ties = np.ones(3, F32), np.empty((0, 4), U32), np.empty(0, np.int64)
    doubled = np.full(3, 2, F32)
    cuts = np.zeros((3, 4), U32)
    cuts[:, 0] = cut
    ties = np.zeros(3, np.int64)
    to = U32(0), out, 0
    elected = weights, True, 1, F32(1), F32(1)
    ranges = np.array([(*bracket, 0)] * 3, U32)
    three = np.arange(3)
    sums = [np.zeros((3, 3)), *(np.zeros((3, 3), np.int64) for _ in range(2))]
    linear = "merge_linear"
    return [
        Case("merge_linear: soup", linear,
             (*alone, False, weights, F32(1.75), F32(1), none, ones, *to), size, 8),
        Case("merge_linear: task_arithmetic", linear,
             (*based, True, weights, F32(1), F32(1), none, ones, *to), size, 10),
        Case("merge_linear: dare", linear,
             (*based, True, weights, F32(1), F32(1), masks, ones, *to), size, 10),
        Case("merge_disjoint: dare_ties", "merge_disjoint",
             (*based, *elected, masks, no_ties, doubled, *to), size, 10),
        Case("merge_disjoint: ties", "merge_disjoint",
             (*based, *elected, cuts, ties, ones, *to), size, 10),
        Case("count_stored", "count_stored",
             (*based, True, three, ranges, np.zeros((3, 1), U32), np.zeros((3, 1), np.int64),
              np.zeros((3, 1), np.int64), np.zeros((3, 2**19), np.int32)), size, 8),
        Case("dot_stored", "dot_stored",
             (stored, starts[:2], kinds[:2], size, False, BLOCK_MULTIPLE,
              np.empty((3, -(-size // BLOCK_MULTIPLE)))), size, 4, note="2 models"),
        Case("measure_stored", "measure_stored",
             (*based[:3], 0, size, True, base, True, masks, no_ties, U32(0), *sums,
              np.zeros(4, np.int64), np.zeros(2)), size, 12, exact=False),
    ]  # fmt: skip


def build(work: Path, architecture: str) -> ctypes.CDLL:
    """The twins, compiled by gcc."""
    library = work / f"kernels-{architecture}.so"
    sources = [str(SCRIPTS / name) for name in ("bench_kernels.c", "bench_codes.c")]
    command = ["gcc", *_FLAGS, f"-march={architecture}", *sources, "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _passed(argument: Any) -> list[Any]:
    """As C takes it: an array is a pointer and its dimensions."""
    if isinstance(argument, np.ndarray):
        dimensions = [ctypes.c_int64(n) for n in argument.shape]
        return [ctypes.c_void_p(argument.ctypes.data), *dimensions]
    if isinstance(argument, np.uint32):
        return [ctypes.c_uint32(int(argument))]
    if isinstance(argument, np.float32):
        return [ctypes.c_float(float(argument))]
    return [ctypes.c_int64(int(argument))]


def copies(arguments: Sequence[Any]) -> list[Any]:
    return [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]


def pair(case: Case, library: ctypes.CDLL) -> tuple[Callable[[], Any], Callable[[], Any], bool]:
    """The kernel and its twin without arguments, and whether they did the same."""
    mine, theirs = copies(case.arguments), copies(case.arguments)
    kernel, twin = getattr(compiled, case.kernel), getattr(library, case.kernel)
    twin.restype = ctypes.c_int64
    returned = kernel(*mine)
    if case.kernel == "quick_change":  # C has no pair to return
        squares = np.empty(2)
        theirs.append(squares)
        mine.append(np.array(returned))
        returned = 0
    result = twin(*[value for argument in theirs for value in _passed(argument)])
    same = int(returned or 0) == result
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if isinstance(a, np.ndarray) and i not in case.used_up:
            same &= bool(_equal(case, a, b))
    call = [value for argument in theirs for value in _passed(argument)]
    given = mine[: len(case.arguments)]

    def run_twin(_alive: Any = theirs) -> Any:  # its arrays, of which C has the addresses
        return twin(*call)

    return lambda: kernel(*given), run_twin, same


def _equal(case: Case, a: Any, b: Any) -> bool:
    if case.exact or a.dtype.kind != "f":
        return a.tobytes() == b.tobytes()
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(a).max(initial=0))))


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    began = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - began) / repeats


def measure(case: Case, library: ctypes.CDLL, rounds: int) -> dict[str, Any]:
    """A kernel and its twin in turns."""
    kernel, twin, same = pair(case, library)
    once = max(seconds_of(twin, 2), 1e-7)
    repeats = max(1, round(_SECONDS / once))
    found: dict[str, list[float]] = {"ours": [], "c": []}
    for number in range(rounds):
        turn = [("ours", kernel), ("c", twin)]
        for name, call in turn if number % 2 == 0 else reversed(turn):
            found[name].append(seconds_of(call, repeats) / case.elements * 1e9)
    ratios = [a / b for a, b in zip(found["ours"], found["c"], strict=True)]
    return {
        "name": case.name,
        "note": case.note,
        "same": same,
        "exact": case.exact,
        "moved": case.moved,
        "ours_ns": statistics.median(found["ours"]),
        "c_ns": statistics.median(found["c"]),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "rounds": found,
    }


def bandwidth() -> float:
    """Bytes read and written in a second by a copy that fits no cache, the best of five."""
    source, target = np.ones(2**26, np.uint8), np.empty(2**26, np.uint8)
    target[:] = source
    return max(2 * len(source) / seconds_of(lambda: np.copyto(target, source), 3) for _ in range(5))


def count_instructions(selected: Sequence[str], size: int, work: Path) -> dict[str, list[float]]:
    """Instructions for each element of kernel and twin, for AVX2, by callgrind."""
    folder = work / "callgrind"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source = folder / "requests.c"
    source.write_text(_CALLGRIND)
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(folder / "requests.so")],
        check=True,
    )
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--combine-dumps=no"]
    command += [f"--callgrind-out-file={folder}/counts", sys.executable, __file__, *selected]
    command += ["--elements", str(size), "--work", str(work), "--counted", str(folder)]
    # LLVM would ask the processor, and compile for AVX-512, which valgrind does not know.
    env = {**os.environ, "NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""}
    env["NUMBA_CACHE_DIR"] = str(work / "numba-v3")
    subprocess.run([sys.executable, __file__, *selected, "--elements", str(size), "--work",
                    str(work), "--compile"], check=True, env=env)  # fmt: skip
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    found: dict[str, list[float]] = {}
    for path in folder.glob("counts.*"):
        text = path.read_text()
        trigger = next((x for x in text.splitlines() if x.startswith("desc: Trigger:")), "")
        total = next((x for x in text.splitlines() if x.startswith(("totals:", "summary:"))), "")
        if "Client Request: " in trigger and total:
            who, _, name = trigger.partition("Client Request: ")[2].partition(" ")
            count = int(total.split()[1])
            elements = next(c.elements for c in cases(size) if c.name == name)
            found.setdefault(name, [0.0, 0.0])[who == "c"] = count / elements
    return found


def run_counted(listed: Sequence[Case], library: ctypes.CDLL, folder: Path) -> None:
    """Inside valgrind: each kernel and twin once, with its own dump."""
    requests = ctypes.CDLL(str(folder / "requests.so"))
    for case in listed:
        kernel, twin, _ = pair(case, library)
        for who, call in (("ours", kernel), ("c", twin)):
            requests.count_on()
            call()
            requests.count_off(f"{who} {case.name}".encode())


def table(rows: Sequence[dict[str, Any]], copied: float) -> str:
    columns = ["kernel", "", "ours ns", "C ns", "ours / C", "share of bandwidth"]
    counted = any("instructions" in row for row in rows)
    columns += ["instructions, ours", "C"] if counted else []
    lines = []
    for row in rows:
        spread = f"{row['ratio']:.2f} ({row['least_ratio']:.2f} to {row['largest_ratio']:.2f})"
        share = row["moved"] / (row["ours_ns"] * 1e-9) / copied
        name = row["name"] if row["same"] else f"{row['name']} **differs**"
        line = [name, row["note"] or ("" if row["exact"] else "~")]
        line += [f"{row['ours_ns']:.3f}", f"{row['c_ns']:.3f}", spread, f"{share:.0%}"]
        if counted:
            line += [f"{count:.2f}" for count in row.get("instructions", ())] or ["", ""]
        lines.append(line)
    return markdown(columns, lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", help="only kernels whose name has one of these parts")
    add("--elements", type=int, default=262_144, help="of a block (default: the engine's)")
    add("--rounds", type=int, default=7)
    add("--instructions", action="store_true", help="count them under valgrind")
    add("--work", type=Path, default=Path("out/bench"), help="compiled twins go here")
    add("--json", type=Path, help="every measurement")
    add("--counted", type=Path, help=argparse.SUPPRESS)
    add("--compile", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    listed = [
        case
        for case in cases(given.elements)
        if not given.parts or any(part in case.name for part in given.parts)
    ]
    if given.compile:
        build(work, "x86-64-v3")
        for case in listed:
            getattr(compiled, case.kernel).load()
        return
    if given.counted:
        run_counted(listed, ctypes.CDLL(str(work / "kernels-x86-64-v3.so")), given.counted)
        return
    library = build(work, "native")
    found = machine(work, SCRIPTS.parent)
    copied = bandwidth()
    rows = []
    for case in listed:
        rows.append(measure(case, library, given.rounds))
        print(f"{case.name}: {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    if given.instructions:
        counts = count_instructions(given.parts, given.elements, work)
        for row in rows:
            if row["name"] in counts:
                row["instructions"] = counts[row["name"]]
    gcc = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout
    document = {"machine": found, "gcc": gcc.splitlines()[0], "copy": copied, "kernels": rows}
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{machine_line(found)}; {document['gcc']}; a copy moves {copied / 1e9:.1f} GB/s\n")
    print(table(rows, copied))
    if missing := without_twin():
        print(f"\nWithout a twin: {', '.join(missing)}.")
    if not all(row["same"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
