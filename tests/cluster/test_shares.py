"""Dealing: every chunk once, in runs, whole tensors where they fit."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_cli
from merge_cli.cluster.shares import Shares
from merge_cli.planning import chunks as planning
from merge_cli.planning.chunks import Chunk, cut_chunks
from tests.support.tiny import Family


@pytest.fixture
def pieces(family: Family, monkeypatch: pytest.MonkeyPatch) -> tuple[merge_cli.Plan, list[Chunk]]:
    """A plan whose larger tensors are several chunks."""
    monkeypatch.setattr(planning, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(planning, "UNIT_BYTES", 1024)
    plan = merge_cli.plan(family.recipe("soup", base=False))
    return plan, cut_chunks(plan.tasks)


def test_every_chunk_is_dealt_once_and_shares_shrink(
    pieces: tuple[merge_cli.Plan, list[Chunk]],
) -> None:
    plan, chunks = pieces
    shares = Shares(plan.tasks, chunks, least=1)
    total = shares.bytes
    assert total == plan.bytes_read + sum(task.size * 2 for task in plan.tasks)
    dealt = []
    while shares:
        share = shares.take(0.25)
        assert [chunk.number for chunk in share] == [*range(share[0].number, share[-1].number + 1)]
        dealt.append(share)
    assert [chunk for share in dealt for chunk in share] == chunks
    sizes = [sum(map(shares.bytes_of, share)) for share in dealt]
    assert total / 4 >= sizes[0] > sizes[-1]
    assert shares.bytes == 0
    assert shares.take(1.0) == []


def test_a_tensor_is_cut_only_where_it_is_larger_than_a_share(
    pieces: tuple[merge_cli.Plan, list[Chunk]],
) -> None:
    plan, chunks = pieces
    of_task = {task: [c for c in chunks if c.task == task] for task in range(len(plan.tasks))}
    shares = Shares(plan.tasks, chunks, least=1)
    cut = set()
    while shares:
        room = 0.2 * shares.bytes
        share = shares.take(0.2)
        for task in {chunk.task for chunk in share}:
            if [c for c in share if c.task == task] != of_task[task]:
                assert sum(map(shares.bytes_of, of_task[task])) > room or task in cut
                cut.add(task)
    assert cut


def test_a_share_has_the_least_size_at_least(
    pieces: tuple[merge_cli.Plan, list[Chunk]],
) -> None:
    plan, chunks = pieces
    shares = Shares(plan.tasks, chunks, least=10**9)
    assert shares.take(0.01) == chunks


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 1.0)), max_size=8))
def test_what_is_given_back_is_dealt_again(steps: list[tuple[float, float]]) -> None:
    """Each step: the part that a share has, and how much of it is finished."""
    plan = _soup()
    chunks = cut_chunks(plan.tasks)
    shares = Shares(plan.tasks, chunks, least=1)
    total, done = shares.bytes, []
    for part, finished in [*steps, (1.0, 1.0)]:
        share = shares.take(part)
        count = int(finished * len(share))
        done += share[:count]
        shares.give_back(share[count:])
        assert shares.bytes == total - sum(map(shares.bytes_of, done))
    while shares:
        done += shares.take(1.0)
    assert sorted(done, key=lambda chunk: chunk.number) == chunks


@cache
def _soup() -> merge_cli.Plan:
    from tests.support.paths import ROOT

    zoo = ROOT / "zoo"
    models = [{"model": str(zoo / name)} for name in ("math", "japanese")]
    return merge_cli.plan({"merge_method": "soup", "models": models})
