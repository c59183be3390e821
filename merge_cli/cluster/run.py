"""One merge on the nodes of a Ray cluster, over storage that they share.

    driver: plan ─▶ allocate the shards ─▶ deal shares ─▶ one journal ─▶ report ─▶ publish
                                            │       ▲
                     each node: the engine on its share, into the same shards, with its own journal

The driver's journal has what the nodes' journals say has reached the storage, so that the merge can
be continued by any number of nodes, or without any. A node that is thought to be lost may still
write: what it writes is what the others write there, since the bytes of a chunk do not depend on
who merges it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.cluster.connection import check_storage, connected, reason, usable_nodes
from merge_cli.cluster.members import Member, checked, open_members, start_member
from merge_cli.cluster.node import SHARED, SHARED_CACHE, Work
from merge_cli.cluster.shares import LEAST_BYTES, Shares
from merge_cli.cluster.summary import together
from merge_cli.engine.device import Device, device_of
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.journal import Journal
from merge_cli.engine.loop import Tally, output_bytes
from merge_cli.engine.merge_stats import MergeStats
from merge_cli.engine.output import NODES
from merge_cli.errors import ResourceError
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.chunks import cut_chunks
from merge_cli.planning.plan import Plan
from merge_cli.system.raw_io import sync, write_error

_POLL_SECONDS = 0.25
_STOP_SECONDS = 10.0
_FRUITLESS = 8  # shares in a row that are answered for, and of which the storage shows nothing
_RESUMES = "The same command resumes, with or without --ray."


@dataclass(frozen=True)
class RayCluster:
    """A connected cluster, whose nodes share the storage of OUT.

    Attributes:
        least: bytes of a share.
    """

    ray: Any
    least: int

    def run(
        self,
        plan: Plan,
        model: Path,
        journal: Journal,
        device: Device,
        options: MergeOptions,
        on_progress: OnProgress,
    ) -> MergeStats:
        """`engine.loop.run_loop`, on the nodes.

        Raises:
            ResourceError: no node can take part, or none is left.
            SourceError, KeyboardInterrupt: as there; what has been finished is in the journal.
        """
        return _Run(self, plan, model, journal, device, options, on_progress).stats()


@contextmanager
def ray_cluster(options: MergeOptions, target: Path) -> Iterator[RayCluster]:
    """Connect to the cluster that the options name, and check its nodes.

    Raises:
        UsageError, ResourceError: it cannot be reached, has no such devices, or its nodes do not
            share the folder of the target.
    """
    assert options.ray is not None
    kind = device_of(options).kind
    with connected(options.ray) as ray:
        check_storage(ray, usable_nodes(ray, kind), Path(os.path.realpath(target)).parent)
        yield RayCluster(ray, LEAST_BYTES)


class _Run:
    """One merge: who does what, and what is done."""

    def __init__(
        self,
        cluster: RayCluster,
        plan: Plan,
        model: Path,
        journal: Journal,
        device: Device,
        options: MergeOptions,
        on_progress: OnProgress,
    ) -> None:
        self._ray, self._plan, self._journal = cluster.ray, plan, journal
        self._device, self._options, self._on_progress = device, options, on_progress
        self._folder = model.parent / NODES
        self._chunks = cut_chunks(plan.tasks)
        # The nodes wait for their own bytes; nobody has to wait here.
        here = replace(options, fsync=False)
        self._tally = Tally(plan, self._chunks, journal, model, here, on_progress)
        left = [chunk for chunk in self._chunks if chunk.number not in journal.done]
        self._done = set(journal.done)
        self._shares = Shares(plan.tasks, left, cluster.least)
        self._members: list[Member] = []
        self._model, self._fruitless = model, 0
        self._work: Any = None  # a reference to it, in Ray's object store

    def stats(self) -> MergeStats:
        began = time.perf_counter()
        survey_seconds = 0.0
        self._tally.report("resumed" if self._tally.resumed else "")
        if self._shares:
            try:
                self._prepare()
                self._start()
                model_pass, survey_seconds = self._look_at_the_model()
                self._deal(model_pass)
            except BaseException:
                self._stop()
                raise
            finally:
                self._end()
        return together(
            self._members,
            self._tally,
            self._device,
            key=self._journal.key,
            seconds=time.perf_counter() - began - survey_seconds,
            survey_seconds=survey_seconds,
        )

    def _prepare(self) -> None:
        """A clean folder for the nodes' journals, and the work in Ray's object store.

        Raises:
            ResourceError: the folder cannot be written, or nodes do not share the cache that they
                have to read statistics from.
        """
        if self._plan.calibrated is not None:
            nodes = usable_nodes(self._ray, self._device.kind)
            for folder in {file.path.parent for file in self._plan.calibrated.files}:
                check_storage(self._ray, nodes, folder.absolute(), hint=SHARED_CACHE)
        try:
            if self._done:  # what was written here must not be less certain than what follows
                sync(self._model / shard.file for shard in self._plan.shards)
                self._journal.synced(self._journal.count)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(error, self._folder) from error
        work = Work(
            self._plan,
            self._model.absolute(),
            self._journal.key,
            inputs_of(self._plan).content_fingerprint,
            str(Path.cwd()),
            self._device.kind,
            self._options,
        )
        self._work = self._ray.put(work)

    @property
    def _present(self) -> list[Member]:
        return [member for member in self._members if not member.lost]

    def _start(self) -> None:
        """Start as many nodes as there is work for.

        Raises:
            ResourceError: none has free CPUs; of a node's own, as it says.
        """
        nodes = usable_nodes(self._ray, self._device.kind)
        count = max(1, -(-self._shares.bytes // self._shares.least))
        kind, threads = self._device.kind, self._options.threads
        # Known before anything is waited for, so that an interruption finds whom to stop.
        self._members = [
            start_member(self._ray, node, self._work, self._folder, kind, threads)
            for node in nodes[:count]
        ]
        open_members(self._ray, self._members, self._note)
        count = len(self._present)
        if not count:
            hint = "Wait until its CPUs are free, or give fewer --threads."
            raise ResourceError("no node of the Ray cluster could begin", hint=hint)
        self._note(f"merging on {count} node{'s' * (count > 1)} of a Ray cluster")

    def _look_at_the_model(self) -> tuple[Any, float]:
        """The method's pass over the whole model, by one node: what it returns, and its seconds.

        Raises:
            ResourceError: every node was lost meanwhile.
        """
        if self._plan.method.model_pass is None:
            return None, 0.0
        while True:
            member = self._present[0]
            call = member.actor.merge.remote([], None)
            try:
                while not self._ray.wait([call], timeout=_POLL_SECONDS)[0]:
                    pass
                answer = checked(self._ray.get(call))
            except self._ray.exceptions.RayError as error:
                self._lose(member, error)
                continue
            if answer.model_pass is not None:
                self._note(f"node {member.node.name} has read the whole model for the others")
            return answer.model_pass, answer.survey_seconds

    def _deal(self, model_pass: Any) -> None:
        """Give every free node a share until nothing is left."""
        shared = self._ray.put(model_pass)
        while True:
            present = self._present
            total = sum(member.node.cpus for member in present)
            for member in present:
                if member.call is None:
                    # Half of its part: the rest is dealt when it is known who is fast.
                    member.share = self._shares.take(member.node.cpus / (2 * total))
                    if member.share:
                        member.call = member.actor.merge.remote(member.share, shared)
            calls = {member.call: member for member in present if member.call is not None}
            if not calls:
                return
            ready, _ = self._ray.wait([*calls], timeout=_POLL_SECONDS)
            for member in calls.values():
                self._read(member)
            for call in ready:
                self._finish(calls[call])

    def _finish(self, member: Member) -> None:
        """Take a node's answer for its share."""
        try:
            answer = checked(self._ray.get(member.call))
        except self._ray.exceptions.RayError as error:
            self._lose(member, error)
            return
        member.answers.append(answer)
        share = member.share
        self._take_back(member)
        is_shown = any(chunk.number in self._done for chunk in share)
        self._fruitless = 0 if is_shown else self._fruitless + 1
        if self._fruitless > _FRUITLESS:
            message = f"what node {member.node.name} has written does not appear in {self._folder}"
            raise ResourceError(message, hint=SHARED)

    def _lose(self, member: Member, error: Exception) -> None:
        """Deal a lost node's share again.

        Raises:
            ResourceError: no node is left.
        """
        member.lost = True
        self._ray.kill(member.actor)
        self._take_back(member)
        self._note(f"node {member.node.name} was lost, others do its share: {reason(error)}")
        if not self._present:
            raise ResourceError("every node of the Ray cluster was lost", hint=_RESUMES)

    def _take_back(self, member: Member) -> None:
        """Note what a node has finished of its share; the rest is dealt again.

        A network's file system may show a journal late: what it does not show is done again, too.
        """
        self._read(member)
        self._shares.give_back(c for c in member.share if c.number not in self._done)
        member.share, member.call = [], None

    def _read(self, member: Member) -> None:
        """Put what a node's journal says into this one."""
        finished = member.log.read()
        new = {number: stats for number, stats in finished if number not in self._done}
        if new:
            chunks = [self._chunks[number] for number in new]
            self._journal.record(new.items())
            self._done |= new.keys()
            self._tally.add(list(zip(chunks, new.values(), strict=True)))
            member.bytes += sum(output_bytes(self._plan, chunk) for chunk in chunks)
        if finished:
            self._journal.synced(self._journal.count)

    def _stop(self) -> None:
        """End every node's share soon, and keep what it has finished."""
        calls = [member.call for member in self._present if member.call is not None]
        for member in self._present:
            member.actor.stop.remote()
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=_STOP_SECONDS)
        for member in self._members:
            self._read(member)

    def _end(self) -> None:
        for member in self._present:
            self._ray.kill(member.actor)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _note(self, text: str) -> None:
        self._on_progress(Progress("merge", 0, 0, text))
