"""The conclusion of a comparison in plain sentences: what to use, what it gains, what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from merge_cli.comparison.result import Comparison, ModelEntry, ModelScore
from merge_cli.report.numbers import three_digits
from merge_cli.system.machine import show_seconds


@dataclass(frozen=True)
class Verdict:
    """What to use.

    Attributes:
        use: the model's name: a merge, or base or source where no merge is better.
        sure: whether it beats the best model that is no merge by more than chance.
        text: the sentences.
    """

    use: str
    sure: bool
    text: str


def verdict(comparison: Comparison) -> Verdict | None:
    """The best merge, if it beats base and sources by more than chance.

    The uniform soup comes first where the best merge is ahead of it by no more than chance may be:
    it has nothing to choose. None where nothing is merged.
    """
    sign = 1.0 if comparison.ranking_better == "higher" else -1.0

    def best(entries: list[ModelEntry]) -> ModelEntry:
        return max(entries, key=lambda entry: sign * comparison.ranking[entry.name].value)

    by = _ranked_by(comparison)
    merges = [entry for entry in comparison.entries if entry.merged]
    parents = [entry for entry in comparison.entries if not entry.merged]
    if not merges or not parents:
        return None
    merge, parent = best(merges), best(parents)
    sure = [m for m in merges if more_than_chance(comparison.difference(m.name, parent.name))]
    if not sure:
        ahead = comparison.difference(merge.name, parent.name)
        way = "ahead of" if ahead.value > 0 else "behind"
        text = (
            f"Use {parent.name}: no merge is better by more than chance. The best of them, "
            f"{merge.name}, is {three_digits(abs(ahead.value))} {way} it in the {by}{_ends(ahead)}."
        )
        return Verdict(parent.name, False, text)
    use, soup = best(sure), comparison.reference
    if soup in sure and not more_than_chance(comparison.difference(use.name, soup.name)):
        use = soup
    ahead, remark = comparison.difference(use.name, parent.name), ""
    if use is not merge:
        more = comparison.difference(merge.name, use.name)
        lead = f"{three_digits(more.value)} ahead of it{_ends(more)}"
        remark = f" {merge.name} is {lead}, which may be chance."
    elif soup is not None and soup is not use:
        more = comparison.difference(use.name, soup.name)
        remark = f" It is {three_digits(more.value)} better than the {soup.name}{_ends(more)}."
    text = (
        f"Use {use.name}: in the {by} it is {three_digits(ahead.value)} better than "
        f"{parent.name}, the best model that is no merge{_ends(ahead)}.{remark}"
        f"{_subjects(comparison, use.name)}{_cost(use)}"
    )
    return Verdict(use.name, True, text)


def more_than_chance(score: ModelScore) -> bool:
    """Whether a difference is positive, and so is all of its interval."""
    return score.value > 0 and (score.interval is None or score.interval.low > 0)


def _amount(value: float, unit: str) -> str:
    """With its unit; shares are told in points of a hundred."""
    return (
        f"{three_digits(100 * value)} points"
        if unit.startswith("of ")
        else f"{three_digits(value)} {unit}"
    )


def _ranked_by(comparison: Comparison) -> str:
    if comparison.quality:
        return "normalised mean (0: the base, 1: each task's own expert)"
    unit = comparison.unit(comparison.tasks[0])
    return f"mean ({unit})" if comparison.averages else f"{comparison.tasks[0]} ({unit})"


def _subjects(comparison: Comparison, name: str) -> str:
    """What a model gains on each task against the base."""
    base = comparison.base
    if base is None or len(comparison.tasks) < 2:
        return ""
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for task in comparison.tasks:
        difference = comparison.difference(name, base.name, task)
        amount = f"{task} ({_amount(abs(difference.value), comparison.unit(task))})"
        ends = difference.interval
        if ends is not None and ends.low <= 0 <= ends.high:
            same.append(task)
        else:
            (better if difference.value > 0 else worse).append(amount)
    parts = [
        *([f"better on {_listing(better)}"] if better else []),
        *([f"worse on {_listing(worse)}"] if worse else []),
        *([f"no more than chance apart on {_listing(same)}"] if same else []),
    ]
    return f" Against the base it is {'; '.join(parts)}."


def _cost(entry: ModelEntry) -> str:
    if entry.cost is None:
        return ""
    read = f" and {entry.cost.tokens:,} tokens" if entry.cost.tokens else ""
    return f" Making it takes {show_seconds(entry.cost.seconds)}{read}."


def _ends(score: ModelScore) -> str:
    if score.interval is None:
        return ""
    low, high = (three_digits(value) for value in (score.interval.low, score.interval.high))
    return f" (95 % interval {low} to {high})"


def _listing(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
