"""Which step is the best, and how much better than the others it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge_cli.auto.checks import SOUP
from merge_cli.auto.measure import Losses, gain, mean_loss

_FINALISTS = 3  # steps that more validation rows choose from

RowsOf = Callable[[Sequence[str]], Mapping[str, Losses]]  # the losses of steps by row


def choose(measured: Sequence[dict[str, Any]], rows_of: RowsOf) -> dict[str, Any]:
    """The best few on all validation rows, and of them the best.

    However small its lead is: it is the better guess, and what the others cost is spent.

    Args:
        measured: lines of steps, in the order of trial; the best few get their `final_loss`.
        rows_of: on all validation rows.
    """
    few = sorted(measured, key=lambda line: line["loss"])[:_FINALISTS]
    if len(few) == 1:
        return few[0]
    losses = rows_of([line["step"] for line in few])
    for line in few:
        line["final_loss"] = mean_loss(losses[line["step"]])
    return min(few, key=lambda line: line["final_loss"])


def judge(
    best: str, rivals: Sequence[str], others: Sequence[str], rows_of: RowsOf
) -> dict[str, Any]:
    """Test rows are looked at here, and nowhere else. They decide nothing.

    Args:
        rivals: what it is compared with; the best static merge is the last of them.
        others: what the path shows, too.
        rows_of: on test rows.
    """
    losses = rows_of([*dict.fromkeys((best, *rivals, *others))])

    def gains(than: Callable[[str], tuple[Losses, Losses]], names: Sequence[str]) -> Any:
        words = ("value", "low", "high")
        return {name: dict(zip(words, gain(*than(name)), strict=True)) for name in names}

    than_rival = gains(
        lambda name: (losses[best], losses[name]),
        [name for name in dict.fromkeys(rivals) if name != best],
    )
    than_soup = gains(
        lambda name: (losses[name], losses[SOUP]),
        [name for name in losses if name != SOUP and SOUP in losses],
    )
    return {
        "loss": {name: mean_loss(rows) for name, rows in losses.items()},
        "losses": {name: {n: m.value for n, m in r.items()} for name, r in losses.items()},
        "gain": than_rival,
        "gain_over_soup": than_soup,
        "better": best != rivals[-1] and than_rival[rivals[-1]]["low"] > 0,
    }


def sentence(best: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    name, gains = best["step"], verdict["gain"]
    loss = verdict["loss"][name]
    if not gains:
        return f"Nothing beats the {name} on validation rows: test loss {loss:.4f} nats per token."

    def words(other: str) -> str:
        value, low, high = (gains[other][key] for key in ("value", "low", "high"))
        way = "below" if value >= 0 else "above"
        sure = "" if low > 0 or high < 0 else ", which may be chance"
        bounds = sorted((abs(low), abs(high))) if low > 0 or high < 0 else (low, high)
        of_test = f"95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}{sure}"
        return f"{abs(value):.4f} {way} {other} ({of_test})"

    text = f"Validation rows choose {name}: test loss {loss:.4f} nats per token, "
    return text + " and ".join(words(other) for other in gains) + "."
