"""A few large pieces of work on a Ray cluster, a task each, with what it needs of a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from merge_cli.cluster.connection import Surroundings, connected, reason, usable_nodes
from merge_cli.errors import MergeCliError, ResourceError

T = TypeVar("T")
_RETRIES = 2  # of a task whose node was lost


@dataclass(frozen=True)
class TaskCluster:
    """A connected cluster, and what each task on it gets.

    Attributes:
        kind: of the device: cuda where nodes have GPUs, one for each task.
        cpus: of each task: as many as the smallest node has.
        memory: of each task, bytes.
    """

    ray: Any
    kind: str
    cpus: int
    memory: int

    def map(
        self, function: Callable[..., T], items: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, T]]:
        """function(*item) of every item, by any node: an item's number and result as they come.

        Leaving early cancels what is left. Caches are where this process has them, which is of use
        to the nodes if they share that folder.

        Raises:
            MergeCliError: as the function does.
            ResourceError: an item has lost several nodes.
        """
        remote = self.ray.remote(
            num_cpus=1 if self.kind == "cuda" else self.cpus,
            num_gpus=1 if self.kind == "cuda" else 0,
            memory=self.memory,
            max_retries=_RETRIES,
        )(_run)
        around = Surroundings.here()
        calls = {remote.remote(function, item, around): number for number, item in enumerate(items)}
        try:
            while calls:
                (ready, *_), _ = self.ray.wait([*calls])
                number = calls.pop(ready)
                try:
                    result = self.ray.get(ready)
                except self.ray.exceptions.RayError as error:
                    message = f"a task on the Ray cluster failed: {reason(error)}"
                    raise ResourceError(message) from error
                if isinstance(result, MergeCliError):
                    raise result
                yield number, result
        finally:
            for call in calls:
                self.ray.cancel(call, force=True)


@contextmanager
def task_cluster(address: str, device: str, cpus: int | None, memory: int) -> Iterator[TaskCluster]:
    """Connect to a cluster for tasks that run models.

    Args:
        device: auto takes GPUs where the cluster has some.
        cpus: of each task; None for all of a node's.
        memory: of each task, bytes; where a node has less, all that it has: a model that does not
            fit is read layer by layer.

    Raises:
        UsageError, ResourceError: as `connected` and `usable_nodes` do.
    """
    with connected(address) as ray:
        nodes = usable_nodes(ray, "cuda" if device == "cuda" else "cpu")
        has_gpu = device != "cpu" and any(node.gpus for node in nodes)
        smallest = min(node.cpus for node in nodes)
        reserved = min(memory, *(node.memory for node in nodes))
        kind = "cuda" if has_gpu else "cpu"
        yield TaskCluster(ray, kind, min(cpus or smallest, smallest), reserved)


def _run(
    function: Callable[..., T], item: tuple[Any, ...], around: Surroundings
) -> T | MergeCliError:
    """On a node. Errors of this program are returned, so that they arrive as what they are."""
    around.take()
    try:
        return function(*item)
    except MergeCliError as error:
        return error
