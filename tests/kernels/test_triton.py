"""The Triton kernels against the plain references, bit for bit.

Every comparison runs compiled where there is a CUDA device, and anywhere in Triton's interpreter.
The interpreter has to be chosen before triton is imported, which another test may have done, so
`test_the_interpreter_agrees` runs this file in a process of its own with TRITON_INTERPRET=1. What
the interpreter cannot show, how a kernel is compiled, is read from the machine code, for which no
device is needed.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_cli.kernels import elect, mask, reduce
from tests.support.paths import ROOT

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("merge_cli.kernels.triton_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy: Inf - Inf and the like
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # triton's own, on Python 3.13
]
compares = (lambda test: test) if INTERPRETED else pytest.mark.cuda
compiles = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")

SIZES = [1, 7, 1000, 65_536 + 3]
SHORT = [1, 7, 2500] if INTERPRETED else SIZES  # a program takes the interpreter 5 ms
DTYPES = [torch.float32, torch.float64]
INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
CPU = torch.device("cpu")


@pytest.fixture
def device() -> torch.device:
    """The last device, so that with several it is not the current one."""
    return CPU if INTERPRETED else torch.device("cuda", torch.cuda.device_count() - 1)


def special(dtype: torch.dtype) -> torch.Tensor:
    info, inf = torch.finfo(dtype), float("inf")
    magnitudes = [0.0, 1.0, info.max, info.tiny, info.tiny / 3, info.smallest_normal * info.eps]
    return torch.tensor([s * m for m in [*magnitudes, inf] for s in (1, -1)] + [inf - inf]).to(
        dtype
    )


def sample(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal values, ties, zeros, denormals, Inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator, dtype=torch.float64) * 1e-3).to(dtype)
    x[::3] = x[::3].bfloat16().to(dtype)
    x[1::7] = special(dtype).repeat(size // 7 + 1)[seed : seed + len(x[1::7])]
    return x


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal patterns; and NaN in the same places, whichever NaN."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype in INTEGER:
        assert torch.equal(actual.isnan(), expected.isnan())
        number = ~expected.isnan()
        actual, expected = (t[number].view(INTEGER[t.dtype]) for t in (actual, expected))
    assert torch.equal(actual, expected)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_interpreter_agrees() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout + child.stderr


def key_of(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype).view(INTEGER[dtype]))


def naive_counts(
    x: torch.Tensor, low: int, high: int, shift: int, bins: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = 31 if x.dtype == torch.float32 else 63
    keys = x.view(INTEGER[x.dtype]).numpy().astype(np.int64) & (2**width - 1)
    inside = keys[(keys >= low) & (keys <= high)]
    counts = np.bincount((inside - low) >> shift, minlength=bins).astype(np.int32)
    return torch.from_numpy(counts), torch.tensor(int((keys > high).sum()))


def ranges(dtype: torch.dtype) -> list[tuple[int, int, int]]:
    width, mantissa = (31, 23) if dtype == torch.float32 else (63, 52)
    one, inf = key_of(1e-3, dtype), key_of(float("inf"), dtype)
    return [
        (0, 2**width - 1, width - 16),  # everything, NaN as well
        (0, inf, width - 20),  # NaN is above
        (0, 0, 0),
        (1, 1, 0),
        (one, one + 2**16 - 1, 0),
        (one - 2**mantissa, one + 2**mantissa, mantissa - 10),
        (inf + 1, 2**width - 1, width - 8),
        (2**width - 1, 2**width - 1, 0),
    ]


@compares
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_count_range(size: int, dtype: torch.dtype, device: torch.device) -> None:
    x = sample(size, dtype)
    for low, high, shift in ranges(dtype):
        bins = ((high - low) >> shift) + 1
        counts = torch.zeros(bins, dtype=torch.int32, device=device)
        above = kernels.count_range(x.to(device), low, high, shift, counts)
        expected, expected_above = naive_counts(x, low, high, shift, bins)
        assert_same_bits(counts, expected)
        assert_same_bits(above, expected_above)
        kernels.count_range(x.to(device)[1:], low, high, shift, counts)  # added, and not aligned
        assert_same_bits(counts, expected + naive_counts(x[1:], low, high, shift, bins)[0])


@compares
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("common", "share"), [(0.0, 0.9), (0.0, 1.0), (-0.25, 0.9), (0.25, 1.0)])
def test_count_range_with_one_crowded_bin(
    common: float, share: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = sample(30_000, dtype)
    x[torch.rand(30_000, generator=torch.Generator().manual_seed(1)) < share] = common
    for low, high, shift in ranges(dtype):
        counts = torch.zeros(2**20, dtype=torch.int32, device=device)
        above = kernels.count_range(x.to(device), low, high, shift, counts)
        expected, expected_above = naive_counts(x, low, high, shift, 2**20)
        assert_same_bits(counts, expected)
        assert_same_bits(above, expected_above)


def naive_mask(size: int, k0: int, k1: int, low: int, limit: int) -> torch.Tensor:
    """mask.py's docstring, in numpy's uint32."""
    x = ((np.arange(size, dtype=np.uint64) + np.uint64(low)) % 2**32).astype(np.uint32)
    x ^= np.uint32(k0)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x21F0AAAD)
    x ^= x >> np.uint32(15)
    x += np.uint32(k1)
    x *= np.uint32(0xD35A2D97)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x31848BAB)
    x ^= x >> np.uint32(14)
    return torch.from_numpy(x < np.uint32(limit))


WORDS = [(0, 0), (1, 1), (2**31, 2**31 - 1), (2**32 - 1, 2**32 - 1), mask.mask_key(7, 1, "w", 0)]
LIMITS = [0, 1, 2**31 - 1, 2**31, round(0.53 * 2**32), 2**32 - 1]


@compares
@pytest.mark.parametrize("low", [0, 1, 2**31 - 500, 2**31, 2**32 - 500, 2**32 - 1])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_mask_and_drop(size: int, low: int, device: torch.device) -> None:
    x = sample(size, torch.float32)
    for k0, k1 in WORDS:
        for limit in LIMITS:
            expected = naive_mask(size, k0, k1, low, limit)
            assert_same_bits(kernels.keep_mask(size, k0, k1, low, limit, device), expected)
            dropped = kernels.drop(x.to(device), k0, k1, low, limit)
            assert_same_bits(dropped, x.where(expected, 0.0))


@compares
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.53, 0.999])
def test_drop_is_the_mask(density: float, dtype: torch.dtype, device: torch.device) -> None:
    start, size = 3 * 2**32 + 2**31 - 500, SHORT[-1]
    x = sample(size, dtype)
    expected = mask.keep_mask(5, 2, "model.norm.weight", start, size, density, CPU)
    words = (*mask.mask_key(5, 2, "model.norm.weight", 3), start % 2**32, round(density * 2**32))
    assert_same_bits(kernels.drop(x.to(device), *words), x.where(expected, 0.0))
    assert_same_bits(kernels.drop(x.to(device)[5:], *words), x[5:].where(expected[:-5], 0.0))
    assert_same_bits(kernels.keep_mask(size, *words, device), expected)


WEIGHTS = [
    [1.0],
    [9.99999997e-9],  # below 1e-8, and above the float32 that is nearest to it
    [0.3, -0.3],
    [1.0, 1.0, 1.0],
    [1 / 3, -0.7, 1e-9],
    [0.1, 0.2, 0.3, 1e20, -0.5],
    [0.0, -1.0, 1e-320, 0.7, 1e39],
]


def stack(sources: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that agree, cancel exactly, are 0, or are special."""
    rows = torch.stack([sample(size, dtype, seed) for seed in range(sources)])
    small = torch.randint(-1, 2, (sources, size), generator=torch.Generator().manual_seed(9))
    rows[:, ::2] = (small[:, ::2] * rows[:1, ::2].abs()).to(dtype)
    return rows


@compares
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("divide_by", ["nothing", "weights", "count"])
@pytest.mark.parametrize("weighted", [True, False])
def test_disjoint_mean(
    weighted: bool, divide_by: str, zero_sign: float, dtype: torch.dtype, device: torch.device
) -> None:
    # Elements know nothing of one another: in the interpreter, every weight with the last size,
    # whose last program is partly empty, and the short sizes with one.
    cases = [*itertools.product(WEIGHTS, SHORT[-1:]), *itertools.product(WEIGHTS[-1:], SHORT[:-1])]
    for weights, size in cases if INTERPRETED else itertools.product(WEIGHTS, SIZES):
        stacked = stack(len(weights), size, dtype)
        actual = kernels.disjoint_mean(stacked.to(device), weights, weighted, divide_by, zero_sign)
        for place in {CPU, device}:
            options: dict[str, Any] = {"divide_by": divide_by, "zero_sign": zero_sign}
            rows = list(stacked.to(place))
            expected = elect.disjoint_mean(rows, weights, weighted_election=weighted, **options)
            assert_same_bits(actual, expected)


@compares
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
@pytest.mark.parametrize("size", SHORT)
def test_weighted_sum(
    size: int, weights: list[float], dtype: torch.dtype, device: torch.device
) -> None:
    stacked = stack(len(weights), size, dtype)
    for place in {CPU, device}:
        expected = reduce.weighted_sum(weights, list(stacked.to(place)))
        assert_same_bits(kernels.weighted_sum(stacked.to(device), weights), expected)
    inner = stacked.to(device)[:, 3:]  # rows that are neither aligned nor one after another
    expected = reduce.weighted_sum(weights, list(stacked[:, 3:]))
    assert_same_bits(kernels.weighted_sum(inner, weights), expected)


@compares
def test_nothing_to_do(device: torch.device) -> None:
    empty = torch.empty(0, device=device)
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    assert kernels.count_range(empty, 0, 0, 0, counts) == 0
    assert kernels.drop(empty, 1, 2, 3, 4).shape == (0,)
    assert kernels.keep_mask(0, 1, 2, 3, 4, device).shape == (0,)
    assert kernels.weighted_sum(empty[None], [1.0]).shape == (0,)
    assert kernels.disjoint_mean(empty[None], [1.0], True, "count", 1.0).shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    x, counts = torch.zeros(4), torch.zeros(16, dtype=torch.int32)
    for low, high, shift in [(0, 16, 0), (0, 32, 1), (3, 2, 0), (-1, 3, 0), (0, 2**31, 28)]:
        with pytest.raises(ValueError, match="bins|need 0 <="):
            kernels.count_range(x, low, high, shift, counts)
    with pytest.raises(ValueError, match="int32"):
        kernels.count_range(x, 0, 1, 0, counts.long())
    with pytest.raises(ValueError, match="float32 or float64"):
        kernels.count_range(x.bfloat16(), 0, 1, 0, counts)
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        kernels.weighted_sum(torch.zeros(2, 4), [1.0])
    with pytest.raises(ValueError, match="contiguous"):
        kernels.weighted_sum(torch.zeros(4, 2).T, [1.0, 1.0])
    with pytest.raises(ValueError, match="zero_sign"):
        kernels.disjoint_mean(torch.zeros(2, 4), [1.0, 1.0], True, "count", 0.5)


class NoDevice:
    """What triton asks of its driver in order to compile for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90], ids=["ampere", "hopper"])
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[list[str]]:
    """The PTX of every kernel that is launched; launches stop once they are compiled."""
    ptx: list[str] = []
    jit = triton.runtime.jit.JITFunction
    launch = jit.run

    def run(self: Any, *args: object, warmup: bool, **options: object) -> None:
        ptx.append(launch(self, *args, warmup=True, **options).asm["ptx"])

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "run", run)
    for kernel in vars(kernels).values():
        if isinstance(kernel, jit):
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(NoDevice(request.param))
    yield ptx
    triton.runtime.driver._active = before


@compiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_rounds_like_torch(dtype: torch.dtype, compiled: list[str]) -> None:
    for size in (1, 64, 65):
        stacked = torch.zeros(3, size, dtype=dtype)
        kernels.weighted_sum(stacked, [1.0, 2.0, 3.0])
        for divide_by in ("nothing", "weights", "count"):
            kernels.disjoint_mean(stacked, [1.0, 2.0, 3.0], True, divide_by, 1.0)
    name, tiny = ("f32", "0f322BCC77") if dtype == torch.float32 else ("f64", "0d3E45798EE2308C3A")
    for number, code in enumerate(compiled):
        assert f"mul.rn.{name}" in code
        assert f"add.rn.{name}" in code
        assert not re.search(r"\bfma\.|\.ftz|\.approx|\.full", code)
        divides = number % 4 > 1
        assert (f"div.rn.{name}" in code) == divides
        assert (tiny in code) == divides


@compiles
def test_machine_code_would_be_fused_otherwise(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_ROUNDED", {"enable_fp_fusion": True})
    kernels.weighted_sum(torch.zeros(3, 64), [1.0, 2.0, 3.0])
    assert "fma.rn.f32" in compiled[0]


@compiles
def test_machine_code_of_integers(compiled: list[str]) -> None:
    for dtype in DTYPES:
        for low, high, shift in ranges(dtype):
            counts = torch.zeros(2**20, dtype=torch.int32)
            kernels.count_range(torch.zeros(64, dtype=dtype), low, high, shift, counts)
    assert all("atom.global" in code or "red.global" in code for code in compiled)
    compiled.clear()
    for k0, k1 in WORDS:
        for limit in LIMITS:
            kernels.drop(torch.zeros(64), k0, k1, 2**32 - 1, limit)
    assert len(set(compiled)) == 1  # compiled once, whatever the words
    assert "setp.lt.u32" in compiled[0]
    assert "shr.u32" in compiled[0]


@pytest.mark.cuda
@compiles
def test_beyond_32_bit_offsets(device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    size = 2**31 + 5
    x = torch.zeros(size, device=device)
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    one = key_of(1.0, torch.float32)
    assert kernels.count_range(x, one, one, 0, counts[:1]) == 2
    assert counts.tolist() == [1, 0]
    words = (*mask.mask_key(0, 0, "w", 0), 0, 2**31)
    expected = naive_mask(3, *words[:2], size - 3, 2**31)
    assert_same_bits(kernels.drop(x, *words)[-3:], x[-3:].cpu().where(expected, 0.0))
    assert_same_bits(kernels.keep_mask(size, *words, device)[-3:], expected)
    stacked = x[: size - 1].view(2, -1)  # its last element is the -2 of `x`
    assert kernels.weighted_sum(stacked, [1.0, 0.5])[-1] == -1.0
    assert kernels.disjoint_mean(x[None], [0.5], True, "nothing", 1.0)[-1] == 1.5
