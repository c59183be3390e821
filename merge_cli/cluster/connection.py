"""A Ray cluster: connect to it, and see that its nodes can share a merge.

Ray is an extra. It waits for minutes where nobody answers, and then ends the process; so somebody
knocks first.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_cli.cluster.node import SHARED, Probe, look, software
from merge_cli.errors import ResourceError, UsageError
from merge_cli.system.caches import cache_folder
from merge_cli.system.notices import say_once
from merge_cli.system.raw_io import write_error

# Of a process that runs a model, beside the model: the interpreter with torch and transformers,
# activations, blocks of the sources.
BESIDE_A_MODEL = 1_000_000_000
_KNOCK_SECONDS = 5.0
_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY")
_ANSWER_SECONDS = 120.0  # a node's first Python process imports for a while
_HINT = "Start one with `ray start --head`, or merge without --ray and `engine: ray`."


@dataclass(frozen=True)
class Node:
    """A node of the cluster that can compute.

    Attributes:
        id: as Ray names it.
        name: for people.
        cpus, gpus, memory: what it offers; bytes of memory.
    """

    id: str
    name: str
    cpus: int
    gpus: int
    memory: int


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected inside; an earlier connection of this process is left as it is.

    Args:
        address: HOST:PORT of the cluster's head; `auto` for that of RAY_ADDRESS, or of a cluster
            that this machine belongs to; `local` for one that is started here.

    Raises:
        UsageError: not such an address.
        ResourceError: Ray is not installed, nobody answers, or another version of Ray.
    """
    if find_spec("ray") is None:
        hint = "pip install 'merge-cli[ray]'"
        raise ResourceError("a merge on a Ray cluster needs the package ray", hint=hint)
    address = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    _knock(address)
    import ray  # takes seconds

    if ray.is_initialized():
        yield ray
        return
    try:
        with _handlers_kept():
            ray.init(
                address=address,
                configure_logging=False,
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )
    except Exception as error:  # Ray has no class for this, and raises bare ones, too
        raise _unreachable(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _unreachable(address: str, error: Exception) -> ResourceError:
    if address == "auto" and isinstance(error, ConnectionError):
        message = "no Ray cluster runs on this machine, and RAY_ADDRESS names none"
        return ResourceError(message, hint=_HINT)
    if address == "local":
        message = f"no Ray cluster can be started here: {reason(error)}"
        hint = "Start one with `ray start --head`, and use --ray auto."
        return ResourceError(message, hint=hint)
    message = f"no Ray cluster can be reached at '{address}': {reason(error)}"
    hint = "Both need the same Ray and Python, and the cluster's token if it has one."
    return ResourceError(message, hint=hint)


def _knock(address: str) -> None:
    if address in ("auto", "local"):
        return
    if "://" in address:
        hint = "Run the command on a machine of the cluster, with --ray auto."
        message = f"'{address}' is for Ray's client, which has no part in the cluster's storage"
        raise UsageError(message, hint=hint)
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()):
        hint = "Give HOST:PORT (Ray's port is 6379), or auto."
        raise UsageError(f"'{address}' is no address of a Ray cluster", hint=hint)
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:  # the second of a port that is none
        why = getattr(error, "strerror", None) or error
        message = f"no Ray cluster answers at '{address}': {why}"
        raise ResourceError(message, hint=_HINT) from error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, which then ends a merge without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def nodes_of(ray: Any) -> list[Node]:
    """The nodes that are alive and offer a CPU, always in the same order."""
    nodes = [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} {node['NodeID'][:6]}",
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
            int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted((node for node in nodes if node.cpus), key=lambda node: node.id)


def usable_nodes(ray: Any, kind: str) -> list[Node]:
    """Those that can compute on this kind of device.

    Raises:
        ResourceError: there are none.
    """
    nodes = nodes_of(ray)
    if not nodes:
        hint = "Start workers with `ray start --address=HOST:6379`."
        raise ResourceError("the Ray cluster has no node with a CPU", hint=hint)
    if kind == "cpu":
        return nodes
    if not any(node.gpus for node in nodes):
        hint = "Use --device cpu, or start nodes with `ray start --num-gpus=N`."
        raise ResourceError("no node of the Ray cluster has a GPU", hint=hint)
    return [node for node in nodes if node.gpus]


def on_node(ray: Any, node: Node) -> Any:
    """The scheduling of a task that runs on this node or nowhere."""
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)


def check_storage(
    ray: Any,
    nodes: Sequence[Node],
    folder: Path,
    hint: str = f"{SHARED} All need the same software.",
) -> None:
    """See that every node reads what is written in a folder here, and writes into the same files.

    A node that has gone, as Ray notices after some seconds, is passed over.

    Raises:
        ResourceError: names each node that does not, and says why; or no node answers.
    """
    path = folder / f".merge-cli-probe-{secrets.token_hex(8)}"
    content, size = secrets.token_bytes(64), 64
    offsets = [len(content) + size * i for i in range(len(nodes))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + bytes(size * len(nodes)))
        try:
            probes = [
                Probe(path.absolute(), content, offset, secrets.token_bytes(size))
                for offset in offsets
            ]
            faults = _ask(ray, nodes, probes)
            written = path.read_bytes()
        finally:
            path.unlink()
    except OSError as error:
        raise write_error(error, folder) from error
    if not faults:
        raise ResourceError("no node of the Ray cluster answers", hint=_HINT)
    listed = []
    for node, probe in zip(nodes, probes, strict=True):
        fault = faults.get(node, "")
        answered = written[probe.offset : probe.offset + size] == probe.answer
        if node in faults and not fault and not answered:
            fault = f"writes into another {folder}"
        if fault:
            listed.append(f"node {node.name} {fault}")
    if listed:
        raise ResourceError("; ".join(listed), hint=hint)


def _answer(probe: Probe, driver: str) -> str:
    ours = software()
    return look(probe) if ours == driver else f"has {ours}, and the driver {driver}"


def _ask(ray: Any, nodes: Sequence[Node], probes: Sequence[Probe]) -> dict[Node, str]:
    """What is wrong with each node that answers. It takes no CPU, so that busy nodes do, too."""
    remote = ray.remote(num_cpus=0, max_retries=0)(_answer)
    calls = [
        remote.options(scheduling_strategy=on_node(ray, node)).remote(probe, software())
        for node, probe in zip(nodes, probes, strict=True)
    ]
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=_ANSWER_SECONDS)
    faults = {}
    for node, call in zip(nodes, calls, strict=True):
        if call not in ready:
            say_once(f"node {node.name} does not answer in {_ANSWER_SECONDS:.0f} seconds")
            continue
        try:
            faults[node] = ray.get(call)
        except ray.exceptions.RayTaskError as error:  # such as a package that is not there
            faults[node] = f"cannot run merge-cli ({reason(error)})"
        except ray.exceptions.RayError as error:
            say_once(f"node {node.name} does not answer: {reason(error)}")
    return faults


@dataclass(frozen=True)
class Surroundings:
    """What a process on a node takes from this one: where paths start, and where caches are."""

    folder: str
    environment: dict[str, str]

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process."""
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        cache = str(cache_folder().absolute())
        return cls(os.getcwd(), {**passed, "MERGE_CLI_CACHE": cache})

    def take(self) -> None:
        """On a node: before anything that reads them is imported."""
        if os.path.isdir(self.folder):  # absolute paths need none
            os.chdir(self.folder)
        os.environ.update(self.environment)


def reason(error: Exception) -> str:
    """What Ray says of an error, without the traces behind it."""
    cause = getattr(error, "cause", None)  # of what a task has raised
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    return str(error).strip().partition("\n")[0]
