"""The few functions of Ray that a merge needs, in this process, with nodes that die on demand.

Everything travels pickled, as it does between processes. A call runs when somebody waits for it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """As Ray raises for an actor or a node that is lost."""


@dataclass
class Actor:
    """A handle: `actor.method.remote(...)` is a call for later."""

    node: str
    ray: FakeRay
    worker: Any = None
    dead: bool = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: Call(self, name, pickle.dumps(given)))


@dataclass(eq=False)
class Call:
    actor: Actor
    method: str
    given: bytes
    answer: Any = None
    is_done: bool = False

    def work(self) -> None:
        """Run it, once; a node that is to die does so before or in the middle of it."""
        if self.is_done:
            return
        self.is_done = True
        ray, node = self.actor.ray, self.actor.node
        given = [ray.objects.get(id(one), one) for one in pickle.loads(self.given)]
        if self.method == "merge":
            ray.merges.append(node)
            if ray.dies(node, len(ray.merges)):
                ray.lost.add(node)
        if node in ray.lost or self.actor.dead:
            self.answer = RayError(f"node {node} died")
            return
        self.answer = pickle.loads(pickle.dumps(getattr(self.actor.worker, self.method)(*given)))


@dataclass
class FakeRay:
    """Stands in for the module `ray`.

    Attributes:
        names: of the nodes, with one CPU each.
        dies: whether a node dies at a merge of this number, counted over all nodes.
        merges: the nodes of all calls that merged.
    """

    names: Sequence[str]
    dies: Callable[[str, int], bool] = lambda node, number: False
    lost: set[str] = field(default_factory=set)
    merges: list[str] = field(default_factory=list)
    objects: dict[int, Any] = field(default_factory=dict)
    exceptions: Any = field(default_factory=lambda: SimpleNamespace(RayError=RayError))

    @property
    def util(self) -> Any:
        def on_node(node: str, *, soft: bool) -> str:
            assert not soft
            return node

        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=on_node)
        return SimpleNamespace(scheduling_strategies=strategies)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "NodeManagerHostname": "host", "Alive": name not in self.lost,
             "Resources": {"CPU": 1.0}}
            for name in self.names
        ]  # fmt: skip

    def put(self, value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))

    def remote(self, *, scheduling_strategy: str, **_: Any) -> Any:
        def of_class(kind: Any) -> Any:
            def make(*given: Any) -> Actor:
                copied = pickle.loads(pickle.dumps(given))
                return Actor(scheduling_strategy, self, kind(*copied))

            return SimpleNamespace(remote=make)

        return of_class

    def wait(self, calls: Sequence[Call], **_: Any) -> tuple[list[Call], list[Call]]:
        for call in calls:
            call.work()
        return [*calls], []

    def get(self, call: Call) -> Any:
        call.work()
        if isinstance(call.answer, RayError):
            raise call.answer
        return call.answer

    def kill(self, actor: Actor) -> None:
        actor.dead = True
