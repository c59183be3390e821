"""What docs/experiments.md shows of the study: a table and a figure for each family.

A run's gain is the uniform soup's loss on test rows minus its own, in nats per token, the mean over
domains. Over several seeds it is their mean. The interval is the paired bootstrap's over test rows
(the same draws for every model), of that mean. The spread over seeds stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lab import DOCS, markdown
from lab import publish as publish_part

from merge_cli.auto.measure import Losses, from_json, gain, mean_loss

SEEDS = (0, 1, 2)
SOUP = "uniform soup"
BUDGETS = ("12k", "50k", "200k")  # beside the default, which has no name
ONCE = ("base", "expert 1", "expert 2", "expert 3", SOUP)  # neither rows nor chance
GROUPS: dict[str, tuple[str, ...]] = {
    "no data": ONCE,
    "a number chosen": ("task arithmetic", "TIES", "DARE"),
    "a few examples": ("Fisher", "RegMean"),
    "automatic": ("search", "DAM", "DAM from the soup", "auto"),
    "training all weights": ("fine-tuning", "distillation", "LoRA distillation"),
} | {
    f"{size} tokens": (
        f"DAM, {size}",
        f"fine-tuning, {size}",
        f"distillation, {size}",
        f"LoRA distillation, {size}",
    )
    for size in BUDGETS
}  # fmt: skip
# What the conclusions compare: the gain of the first over the second.
PAIRS = (
    ("Fisher", "task arithmetic"), ("DAM", "task arithmetic"), ("DAM", "Fisher"),
    ("auto", "Fisher"), ("auto", "DAM"), ("DAM", "DAM from the soup"), ("DAM", "search"),
    ("DAM", "distillation"), ("DAM", "LoRA distillation"), ("DAM", "fine-tuning"),
    *(
        (f"DAM, {size}", f"{kind}, {size}")
        for size in BUDGETS
        for kind in ("distillation", "fine-tuning")
    ),
    ("DAM, 200k", "Fisher"), ("DAM, 200k", "auto"),
)  # fmt: skip
_COLOURS = (
    "#555555", "#957000", "#00805c", "#0068a8", "#c8500a", "#a8508a", "#7a4fb5", "#3a3a8a",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One method on one family.

    Attributes:
        losses: on test rows, by domain, the mean over seeds.
        gains: by seed; of the mean over seeds with its interval in `gain`.
    """

    losses: Mapping[str, float]
    gains: Sequence[float]
    gain: tuple[float, float, float]
    cpu: float
    tokens: float
    chosen: Sequence[str]

    @property
    def seeds(self) -> int:
        return len(self.gains)


def cells(family: Mapping[str, Any]) -> dict[str, Cell]:
    """Every method that has been measured."""
    runs = family["runs"]

    def losses(run: Mapping[str, Any]) -> Losses:
        return _losses(family, run["parts"])

    reference = runs.get(f"{SOUP}, seed 0")
    result: dict[str, Cell] = {}
    for method in (name for names in GROUPS.values() for name in names):
        found = [runs[key] for seed in SEEDS if (key := f"{method}, seed {seed}") in runs]
        if not found or reference is None:
            continue
        measured = [losses(run) for run in found]
        together = _losses(family, _mean_parts(found))
        result[method] = Cell(
            {name: metric.value for name, metric in together.items()},
            [mean_loss(losses(reference)) - mean_loss(one) for one in measured],
            gain(together, losses(reference)),
            mean(run["cpu"] for run in found),
            mean(run["tokens"] for run in found),
            [run["chosen"] for run in found],
        )
    return result


def _losses(family: Mapping[str, Any], parts: Mapping[str, Sequence[float]]) -> Losses:
    return from_json({name: [nats, family["weights"][name]] for name, nats in parts.items()})


def differences(family: Mapping[str, Any]) -> str:
    """Markdown: what one method gains over another, of the seeds that both have, paired by row."""
    runs, rows = family["runs"], []
    for one, other in PAIRS:
        names = [(f"{one}, seed {seed}", f"{other}, seed {seed}") for seed in SEEDS]
        both = [(runs[a], runs[b]) for a, b in names if a in runs and b in runs]
        if not both:
            continue
        first, second = (_mean_parts(found) for found in zip(*both, strict=True))
        value, low, high = gain(_losses(family, first), _losses(family, second))
        interval = f"{_signed(low)} to {_signed(high)}"
        rows.append([f"{one} over {other}", _signed(value), interval, str(len(both))])
    return markdown(["gain of", "nats", "95 % interval", "seeds"], rows)


def _mean_parts(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each test row's nats, the mean over seeds."""
    return {
        name: [mean(values) for values in zip(*(run["parts"][name] for run in runs), strict=True)]
        for name in runs[0]["parts"]
    }


def table(family: Mapping[str, Any], domains: Sequence[str]) -> str:
    """Markdown: a row for each method, in the order of `GROUPS`."""
    rows = []
    for method, cell in cells(family).items():
        low, high = cell.gain[1:]
        interval = "–" if method == SOUP else f"{_signed(low)} to {_signed(high)}"
        spread = f"{_signed(min(cell.gains))} to {_signed(max(cell.gains))}"
        rows.append(
            [
                label(method, domains),
                *(f"{cell.losses[name]:.3f}" for name in domains),
                f"{mean(cell.losses.values()):.3f}",
                "–" if method == SOUP else f"**{_signed(cell.gain[0])}**",
                interval,
                _seeds(method, cell, spread),
                f"{cell.cpu:,.0f}" if cell.cpu else "–",
                f"{cell.tokens:,.0f}" if cell.tokens else "–",
            ]
        )
    heads = ["method", *domains, "mean", "gain", "95 % interval", "seeds", "CPU s", "tokens"]
    return markdown(heads, rows)


def _seeds(method: str, cell: Cell, spread: str) -> str:
    if method in ONCE:
        return "none"
    return f"{cell.seeds}: {spread}" if cell.seeds > 1 else "1"


def label(method: str, domains: Sequence[str]) -> str:
    """`expert 1` is called by its domain."""
    name, _, number = method.partition(" ")
    return f"the {domains[int(number) - 1]} expert" if name == "expert" else method


def chosen(family: Mapping[str, Any]) -> str:
    """A sentence on what validation rows chose, by seed."""
    found = [
        f"{method}: {'; '.join(cell.chosen)}"
        for method, cell in cells(family).items()
        if any(cell.chosen)
    ]
    return f"Chosen on validation rows, by seed. {'. '.join(found)}."


def _signed(value: float) -> str:
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text == "−0.000" else text


def draw(name: str, family: Mapping[str, Any], domains: Sequence[str], folder: Path) -> None:
    """Gain over the soup with its interval, over CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    measured = cells(family)
    for number, (group, methods) in enumerate(GROUPS.items()):
        points = [(m, measured[m]) for m in methods if m in measured and measured[m].cpu]
        if not points:
            continue
        x = [cell.cpu for _, cell in points]
        y = [cell.gain[0] for _, cell in points]
        bars = [
            [cell.gain[0] - cell.gain[1] for _, cell in points],
            [cell.gain[2] - cell.gain[0] for _, cell in points],
        ]
        colour = _COLOURS[number]
        axes.errorbar(x, y, yerr=bars, fmt="o", color=colour, capsize=3, markersize=5, label=group)
        for (method, _), left, height in zip(points, x, y, strict=True):
            text = method.partition(", ")[0]
            axes.annotate(text, (left, height), (5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="#888", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(
        xlabel="CPU seconds (logarithmic)",
        ylabel="gain over the uniform soup on test rows,\nnats per token",
        title=", ".join(domains),
    )
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(folder / f"study-{name}.png", dpi=110, metadata={"Software": ""})
    plt.close(figure)


def publish(document: Mapping[str, Any], preview: Path | None) -> None:
    """Tables into docs/experiments.md and figures beside it; a preview goes into another folder."""
    for name, family in document["families"].items():
        domains = list(family["weights"])
        text = f"{table(family, domains)}\n\n{chosen(family)}\n\n{differences(family)}"
        draw(name, family, domains, preview or DOCS)
        if preview:
            print(text)
        else:
            publish_part(f"study-{name}", text)
