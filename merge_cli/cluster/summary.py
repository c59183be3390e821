"""What all nodes have done, as the report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_cli.cluster.members import Member
from merge_cli.engine.device import Device
from merge_cli.engine.loop import Tally
from merge_cli.engine.merge_stats import MergeStats, StageTime


def together(
    members: Sequence[Member],
    tally: Tally,
    device: Device,
    *,
    key: str,
    seconds: float,
    survey_seconds: float,
) -> MergeStats:
    """The statistics of a merge on a cluster.

    Args:
        tally: what has been merged, by chunk.
        key: of the work.
        seconds: of the clock; `survey_seconds` of them to look at the whole model.
    """
    answers = [answer for member in members for answer in member.answers]
    last = [member.answers[-1] for member in members if member.answers]
    threads = sum(answer.threads for answer in last)
    return MergeStats(
        key=key,
        device=device,
        arithmetic=answers[0].arithmetic if answers else "",
        threads=threads,
        buffers=sum(answer.buffers for answer in last),
        stages=_stages([answer.stages for answer in answers], threads),
        stats=tally.stats,
        resumed=tally.resumed,
        seconds=seconds,
        survey_seconds=survey_seconds,
        nodes=tuple(member.stats for member in members),
    )


def _stages(stages: Sequence[Mapping[str, StageTime]], threads: int) -> dict[str, StageTime]:
    """What all shares have taken; with `threads` at work at once."""
    return {
        name: StageTime(
            sum(each[name].seconds for each in stages),
            max(1, threads),
            sum(each[name].bytes for each in stages),
        )
        for name in (stages[0] if stages else ())
    }
