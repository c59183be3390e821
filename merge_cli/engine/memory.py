"""How much memory a merge may use, how workers share it, and how much it has used.

What a worker holds at once is known: a block of every input as it is stored, upcast, and what the
method makes of it. Everything else is the interpreter, its libraries and the plan.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from merge_cli.engine.device import Device, choose_arithmetic, free_memory
from merge_cli.errors import UsageError
from merge_cli.formats.packed import PACKED
from merge_cli.formats.stored_matrix import STRIP_BYTES
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.options import MergeOptions
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.totals import largest
from merge_cli.system.machine import usable_cores

# From here on every merge is accepted; below, one that fits: some hold more than they should.
_ALWAYS_ENOUGH = 500_000_000
# Measured with scripts/bench.py: the interpreter with its libraries; what numba or torch add; what
# the plan and the report hold for each tensor, and for each in each model (bench_window.py).
_RUNTIME = 122_000_000
_LIBRARIES = {"compiled": 58_000_000, "torch": 172_000_000}
_TENSOR, _SOURCE_TENSOR = 7_000, 600  # bytes
# For each operand: the largest sample and the histograms of an exact threshold; a histogram alone;
# and when the sample is so large (see `kernels.select`).
_SEARCH = {"compiled": 20_000_000, "torch": 45_000_000}
_HISTOGRAM = 4_000_000
_UNSAMPLED, _SAMPLE_SHARE, _LARGEST_SAMPLE = 2**17, 64, 2**21
# Arrays of a block that a method makes besides its operands.
_TEMPORARIES = {"compiled": 6, "torch": 14}
_STORED = 2  # bytes of a stored element, as a rule
_UNPACKED = 8 * 2**20  # what a block of a quantised weight is computed with
# 1 MiB an operand. Smaller blocks stay in L2, but threads then wait for Python's lock more often:
# not where many operands make the work on each block longer.
_HOST_BLOCK = 4 * BLOCK_MULTIPLE
_FULL_BLOCKS = 16  # operands, at most, that have blocks of that size
# With many threads the time that a block holds Python's lock counts more than the cache, where it
# is not one call for a whole chunk: larger blocks hold it less often (docs/scaling.md).
_MANY_THREADS, _LARGER = 8, 4
_GPU_WORKERS = 4  # on one device: one reads, one copies, one computes, one writes
_GPU_BLOCK = 64 * BLOCK_MULTIPLE
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEEP_BYTES = -1, -3, 32 * 2**20  # malloc.h
_RETURN_BYTES = 2**19


@dataclass(frozen=True)
class WorkerMemory:
    """What each worker may use.

    Attributes:
        workers: how many there are.
        block: elements of a block.
        inputs: how many tensors are read for one, at most.
        bytes: what a worker holds on the host.
    """

    workers: int
    block: int
    inputs: int
    bytes: int


def worker_memory(plan: Plan, device: Device, options: MergeOptions) -> WorkerMemory:
    """As many workers as there are threads, or as the memory holds; larger blocks on a GPU.

    Raises:
        UsageError: less memory than a merge can work in.
    """
    _refuse_too_little(plan, device, options)
    inputs = plan.most_inputs
    # What a container or a batch system leaves us counts, too, with what we hold already.
    allowed = min(options.max_memory, peak_rss() + free_memory("cpu", ()))
    free = max(0, allowed - _fixed(plan, device))
    if device.kind == "cpu":
        return _host_memory(plan, inputs, options.threads or usable_cores(), free)
    workers = (1 if _tensor_bytes(plan) else _GPU_WORKERS) * len(device.indexes)
    width = (_STORED * inputs + 4) if inputs else 4  # pinned: every input as stored, the output
    room = free // (workers * width)
    # On the device: the operands, what the method makes of them, and as much in between.
    vram = device.memory or min(free_memory("cuda", (index,)) for index in device.indexes)
    room = min(room, vram // (_GPU_WORKERS * 4 * (3 * inputs + _TEMPORARIES["torch"])))
    block = max(1, min(_GPU_BLOCK, room) // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    return WorkerMemory(workers, block, inputs, block * width)


def _host_memory(plan: Plan, inputs: int, threads: int, free: int) -> WorkerMemory:
    """Workers on a CPU: all threads with blocks as large as the memory holds, or fewer threads."""
    usual = _host_block(inputs)
    blocks = [usual, BLOCK_MULTIPLE]
    if threads >= _MANY_THREADS and inputs <= _FULL_BLOCKS and plan.method.fused is None:
        blocks = [_LARGER * usual, _LARGER // 2 * usual, *blocks]
    sizes = {block: _host_bytes(plan, inputs, block) for block in blocks}
    for block in blocks[:-1]:
        if threads * sizes[block] <= free:
            return WorkerMemory(threads, block, inputs, sizes[block])
    block = usual if 2 * sizes[usual] <= free else BLOCK_MULTIPLE
    workers = max(1, min(threads, free // sizes[block]))
    return WorkerMemory(workers, block, inputs, sizes[block])


def _host_bytes(plan: Plan, inputs: int, block: int) -> int:
    """What a worker holds with blocks of this size."""
    spare = _TEMPORARIES[choose_arithmetic(plan)[0]]
    if plan.method.preparation == "calibration":
        spare += 2 * inputs  # a block's statistics, and with weights
    return (
        block * ((_STORED + 4) * inputs + 4 * spare)
        + _tensor_bytes(plan)
        + _encoding_bytes(plan)
        + (_UNPACKED + inputs * 2 * STRIP_BYTES if _reads_packed(plan) else 0)
    )


def _refuse_too_little(plan: Plan, device: Device, options: MergeOptions) -> None:
    """Raise where less memory is allowed than this merge takes with one thread and small blocks.

    Raises:
        UsageError: says how much that is.
    """
    inputs = plan.most_inputs
    least = _fixed(plan, device)
    least += _host_bytes(plan, inputs, BLOCK_MULTIPLE) if device.kind == "cpu" else _ALWAYS_ENOUGH
    if options.max_memory < min(least, _ALWAYS_ENOUGH):
        message = f"--max-memory of {options.max_memory / 1e6:.0f} MB is too little"
        least = min(-(-least // 10**7) * 10**7, _ALWAYS_ENOUGH)
        raise UsageError(message, hint=f"Give this merge at least {least / 1e6:.0f} MB.")


def _search_bytes(plan: Plan, kind: str) -> int:
    """What the search for exact thresholds holds at its peak, whatever the threads.

    It depends on how many numbers are ranked together.
    """
    method = plan.method
    if not method.ranks_magnitudes:
        return 0
    merged = [task for task in plan.tasks if task.action == "merge"]
    ranked = plan.parameter_count if method.model_pass else largest(merged)
    if ranked <= _UNSAMPLED:
        return 0
    share = min(ranked / _SAMPLE_SHARE / _LARGEST_SAMPLE, 1.0)
    operands = max(map(len, map(attrgetter("operands"), merged)))
    return operands * max(_HISTOGRAM, int(share * _SEARCH[kind]))


def _host_block(inputs: int) -> int:
    """Elements of a block on a CPU, so that those of 40 operands take little more than of 16."""
    if inputs <= _FULL_BLOCKS:
        return _HOST_BLOCK
    return max(1, _HOST_BLOCK * _FULL_BLOCKS // inputs // BLOCK_MULTIPLE) * BLOCK_MULTIPLE


def estimated_peak(plan: Plan, device: Device, options: MergeOptions) -> int:
    """What the process will hold at its peak, from the plan alone."""
    room = worker_memory(plan, device, options)
    return _fixed(plan, device) + room.workers * room.bytes * _computes(plan)


def keep_freed_memory() -> None:
    """Let this process keep the blocks that it frees and asks for again at once.

    glibc gives large ones back to the system, and every block of a merge would be faulted in anew,
    page by page: a third of the time of a soup. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def return_freed_memory() -> None:
    """Give large blocks back to the system as soon as they are freed.

    Training frees activations of many sizes; glibc would keep them, in pieces that fit nothing
    later, and a process would grow by half a model. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURN_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 4 * _RETURN_BYTES)
        libc.malloc_trim(0)


def _tensor_bytes(plan: Plan) -> int:
    """What a worker holds of its largest tensor, if the method looks at whole ones."""
    extra_arrays = plan.method.extra_memory
    if extra_arrays is None:
        return 0
    held = [
        4 * task.size * (len(task.inputs) + arrays)
        for task in plan.tasks
        if task.action == "merge"
        and not plan.is_plain_mean(task)
        and (arrays := extra_arrays(shape=task.shape, **task.parameters))
    ]
    return max(held, default=0)


def _encoding_bytes(plan: Plan) -> int:
    """What a worker holds of an output in codes: a tile as numbers and as codes, a span's bytes."""
    return max((_held(task) for task in plan.tasks if task.encoding is not None), default=0)


def _held(task: TensorTask) -> int:
    encoding = task.encoding
    if encoding is None or task.moved or not task.size:
        return 0
    tile, span = encoding.tile(task.shape), encoding.span(task.shape)
    stored = [part.bytes_of(0, span) for part in encoding.parts(task.shape)]
    block = 5 * _HOST_BLOCK  # the codes of a block; what is kept of it as numbers
    return 5 * tile + sum(end - begin for begin, end in stored) + block


def _reads_packed(plan: Plan) -> bool:
    """Whether any input is computed from codes of few bits."""
    return any(ref.dtype in PACKED for tensor in plan.input_totals.derived for ref in tensor.stored)


def _fixed(plan: Plan, device: Device) -> int:
    """What does not depend on the workers."""
    stored = sum(len(source.tensors) for source in plan.sources)
    fixed = _RUNTIME + _TENSOR * len(plan.tasks) + _SOURCE_TENSOR * stored
    if not _computes(plan):
        return fixed
    kind = "torch" if device.kind == "cuda" else choose_arithmetic(plan)[0]
    return fixed + _LIBRARIES[kind] + _search_bytes(plan, kind)


def _computes(plan: Plan) -> bool:
    """Whether anything is computed; plain copies are made inside the system's kernel."""
    return bool(plan.computed)


def peak_rss() -> int:
    """The largest resident size that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux's ru_maxrss is inherited from the process that started us, however large that was.
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
