"""Primitives of formats, adapters and analyses by themselves, in seconds that noise hardly moves.

    python scripts/bench_decoding.py
    PYTHONPATH=OTHER_CHECKOUT python scripts/bench_decoding.py     # the same of another one

CPU seconds of one thread, the least of several runs, on arrays that fit the cache: nanoseconds for
each number that is decoded, and milliseconds for each matrix that is decomposed (896 x 4,864 noise,
the worst case for a truncation, with the share of the best approximation that it holds).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from merge_cli.formats.gguf.blocks import BLOCK_TYPES
from merge_cli.formats.packed import unpack
from merge_cli.formats.small_floats import fp4_numbers
from merge_cli.kernels.matrices import add_low_rank, singular_values
from merge_cli.kernels.measures import Relations, add_relations

NUMBERS = 65_536
RUNS = 7


def least(work: Callable[[], Any], runs: int = RUNS) -> float:
    """CPU seconds of the quickest run; one more comes before and compiles."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def show(name: str, work: Callable[[], Any], numbers: int) -> None:
    print(f"| {name} | {least(work) / numbers * 1e9:.2f} ns |", flush=True)


def main() -> None:
    random = np.random.default_rng(0)

    def noise(*shape: int) -> Any:
        return random.integers(0, 256, shape).astype(np.uint8)

    def floats(*shape: int) -> Any:
        return random.normal(size=shape).astype(np.float32)

    print("| primitive | for each number or matrix |\n|---|---:|")
    with np.errstate(all="ignore"):
        for kind in BLOCK_TYPES.values():
            if not kind.dtype:
                raw, out = noise(NUMBERS // kind.elements, kind.nbytes), floats(NUMBERS)
                numbers = out.reshape(-1, kind.elements)
                show(f"GGUF {kind.name}", lambda k=kind, r=raw, n=numbers: k.decode(r, n), NUMBERS)
    codes = noise(32, NUMBERS // 64)
    show("codes of 4 bits", lambda: unpack(codes, 4), NUMBERS)
    show("E2M1", lambda: fp4_numbers(codes), NUMBERS)
    for rank in (16, 64):
        left, right, total = floats(54, rank), floats(rank, 4864), floats(54, 4864)
        label = f"low-rank product of {rank}"
        show(label, lambda a=left, b=right, t=total: add_low_rank(a, b, 0.5, t), 54 * 4864)
    rows, sums = floats(4, NUMBERS), Relations.empty(3)
    show("relations of three", lambda: add_relations(list(rows), [2.0] * 3, sums), NUMBERS)
    square = random.normal(size=(256, 256))
    seconds = least(lambda: singular_values(square))
    print(f"| singular values of 256 x 256 | {1000 * seconds:.1f} ms |", flush=True)
    decompose(floats(896, 4864))


def decompose(matrix: Any) -> None:
    import torch

    from merge_cli.adapters.factors import RankTruncation, factorise

    torch.set_num_threads(1)
    values = torch.linalg.svdvals(torch.from_numpy(matrix).double()).square()
    for name, cut in (
        ("rank 16", RankTruncation(16)),
        ("rank 64", RankTruncation(64)),
        ("50 % of the energy", RankTruncation(energy=0.5)),
    ):
        factors = factorise(matrix, cut)
        assert factors is not None
        best = float(values[: factors.rank].sum() / values.sum())
        seconds = least(lambda c=cut: factorise(matrix, c), 3)
        share = f"{100 * factors.share / best:.1f} % of the best"
        print(f"| 896 x 4864, {name} | {1000 * seconds:.0f} ms, {share} |", flush=True)


if __name__ == "__main__":
    main()
