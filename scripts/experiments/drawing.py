"""The experiments' plots: normalised quality with its spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from lab import DOCS, of
from matplotlib import pyplot as plt

_COLOURS = ("#0068a8", "#c8500a", "#00805c", "#a8508a", "#957000", "#3f95c6")
_MARKS = "osD^v*"
_Y = "normalised mean loss\n(0: base, 1: each domain's own expert)"


def quality_over(
    name: str,
    x_label: str,
    results: Mapping[Any, Sequence[Mapping[str, Any]]],
    methods: Sequence[str],
    ticks: Sequence[str],
) -> None:
    """One line for each method; bars from the worst to the best seed."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for m, method in enumerate(methods):
        found = [
            [of(one, method)["normalised_mean"]["value"] for one in seeds]
            for seeds in results.values()
        ]
        _line(axes, [x + (m - 1.5) * 0.05 for x in range(len(found))], found, m, method)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.axhline(0, color="#888", linewidth=1, linestyle="--")
    axes.set(xlabel=x_label, ylabel=_Y)
    axes.legend(frameon=False)
    _save(figure, name)


def _line(
    axes: Any, x: Sequence[float], found: Sequence[Sequence[float]], m: int, label: str
) -> None:
    middle = [mean(values) for values in found]
    low = [a - min(values) for a, values in zip(middle, found, strict=True)]
    high = [max(values) - a for a, values in zip(middle, found, strict=True)]
    axes.errorbar(
        x,
        middle,
        yerr=[low, high],
        color=_COLOURS[m],
        marker=_MARKS[m],
        capsize=3,
        markersize=5,
        linewidth=1.5,
        label=label,
    )


def _save(figure: Any, name: str) -> None:
    for side in ("top", "right"):
        figure.axes[0].spines[side].set_visible(False)
    figure.savefig(DOCS / f"{name}.png", dpi=110, metadata={"Software": ""})
    plt.close(figure)
