"""What a pool of threads is made with: arithmetic, lanes, and errors in our own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from merge_cli.engine.device import Device, choose_arithmetic
from merge_cli.engine.lanes import Files, HostWorker, TorchWorker, WorkerContext
from merge_cli.engine.memory import WorkerMemory
from merge_cli.engine.plan import Plan
from merge_cli.errors import ResourceError
from merge_cli.machine import torch_threads


def arithmetic_for(plan: Plan, device: Device) -> tuple[str, str]:
    """What computes, and why nothing faster does."""
    if device.kind == "cpu":
        return choose_arithmetic(plan)
    from merge_cli.kernels.gpu import missing

    why = missing()
    return ("torch", why) if why else ("triton", "")


def worker_factory(
    files: Files, device: Device, arithmetic: str, room: WorkerMemory
) -> Callable[[int], WorkerContext]:
    """What makes the pool's lanes. Devices take turns."""
    if device.kind == "cuda":
        from merge_cli.engine.staging import cuda_worker

        return lambda number: cuda_worker(
            files, device.indexes[number % len(device.indexes)], room.block
        )
    kind = HostWorker if arithmetic == "compiled" else TorchWorker
    return lambda number: kind(files, room.block, room.inputs)


@contextmanager
def one_torch_thread(device: Device, arithmetic: str) -> Iterator[None]:
    """Blocks are the parallelism here; torch's own threads would fight over the same cores."""
    if device.kind == "cpu" and arithmetic == "compiled":
        yield
        return
    with torch_threads(1):
        yield


@contextmanager
def memory_errors(*, resumes: bool = True) -> Iterator[None]:
    """Say in our own words that memory ran out, on the host or on the device."""
    hint = "Give it less: a lower --max-memory, fewer --threads, or --device cpu."
    hint += " It resumes." if resumes else ""
    try:
        yield
    except MemoryError as error:
        raise ResourceError("memory ran out", hint=hint) from error
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
            raise ResourceError("the device's memory ran out", hint=hint) from error
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("memory ran out", hint=hint) from error
