"""The report page's sections on learning: what was learned, and whether it was worth it.

Their data is in merge_report.json under `coefficients` and `training` (docs/dam.md).

Learned coefficients in the report: how much of each source every layer took.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.planning.layers import layer_key_of
from merge_cli.planning.plan import Plan
from merge_cli.recipe.reference import short_labels
from merge_cli.recipe.training import ROLLOUTS_TERM
from merge_cli.report import charts
from merge_cli.report.charts import Axis, Scale, Series
from merge_cli.report.numbers import (
    count,
    duration,
    number,
    percent,
    size,
    three_decimals,
    three_digits,
)
from merge_cli.report.page import Part, Section, Table, figure, section, strong

Json = Mapping[str, Any]
_POINTS = 40  # of a training curve


def training_sections(report: Json) -> list[Section]:
    """The sections of a report of learned coefficients; none for other methods."""
    result = []
    if report.get("training"):
        result += [_worth(report["training"]), _curves(report["training"])]
    if report.get("coefficients"):
        result.append(_heat(report["coefficients"]))
    if report.get("training"):
        result.append(_training_cost(report["training"]))
    return result


def _heat(coefficients: Json) -> Section:
    form = coefficients["form"]
    how = "The mean coefficient of each source, by layer. " + (
        "A plain average would be 1/sources everywhere."
        if form == "soup"
        else "What each source's change from the base is multiplied by."
    )
    groups = [group for group in coefficients["groups"] if group["mean"]]
    layers = [group for group in groups if group["layer"] is not None]
    outside = [group for group in groups if group["layer"] is None]
    models = [charts.shorten(model) for model in coefficients["models"]]
    total = sum(group["count"] for group in groups) or 1
    means = [sum(g["mean"][i] * g["count"] for g in groups) / total for i in range(len(models))]
    summary = "Whole model: " + ", ".join(
        f"{name} {three_decimals(value)}" for name, value in zip(models, means, strict=True)
    )
    figures: list[Part] = []
    if layers:
        ends = [value for group in layers for value in group["mean"]]
        top = max(map(abs, ends)) or 1.0
        low = -top if min(ends) < 0 else 0.0
        axis = charts.layer_axis(
            [f"layer {g['layer']}" for g in layers], [g["layer"] for g in layers], "layer"
        )
        scale = Scale(lambda v: v / top, (low, (low + top) / 2, top), three_digits, "coefficient")
        rows = [[group["mean"][i] for group in layers] for i in range(len(models))]
        chart = charts.heat_map("Mean coefficient", models, axis, rows, scale)
        figures.append(figure("Mean coefficient by layer and source.", chart))
    means_outside = [
        [group["name"], *(number(value, ".4f") for value in group["mean"])] for group in outside
    ]
    if means_outside:
        heads = ["outside the layers", *models]
        figures.append(Table(heads, means_outside, right=len(models)))
    return section("Learned coefficients", how, f"{summary}.", *figures)


def worth(training: Json) -> str:
    """Whether learning was better than every merge without it; empty where nothing was held out."""
    verdict = training["verdict"]
    if verdict is None:
        return ""
    gain = 1 - verdict["ratio"]
    static = f"{verdict['best_static']} ({verdict['best_static_kl']:.4g})"
    if gain <= 0:
        return f"NO IMPROVEMENT: held-out KL {verdict['kl']:.4g}; without training {static}."
    return (
        f"Held-out KL {verdict['kl']:.4g}, {percent(gain)} below the best without training, "
        f"{static}."
    )


def _worth(training: Json) -> Section:
    title = "Whether it was worth it"
    how = (
        "KL(teacher ‖ model) on held-out rows at temperature 1, nats per token: how far a model "
        "is from each source on that source's own data. Lower is better. Loss is on the text."
    )
    scores, verdict = training["scores"], training["verdict"]
    if verdict is None:
        return section(title, "", "Nothing was held out, so it is not known.")
    summary = worth(training)
    names = list(next(iter(scores.values()))["kl"])
    best = min(score["mean_kl"] for score in scores.values())
    rows = [
        [
            strong(name) if score["mean_kl"] == best else name,
            *(f"{score['kl'][dataset]:.4f}" for dataset in names),
            f"{score['mean_kl']:.4f}",
            *(f"{score['loss'][dataset]:.3f}" for dataset in names),
            f"{score['mean_loss']:.3f}",
        ]
        for name, score in scores.items()
    ]
    heads = [
        "model",
        *(f"KL {n}" for n in names),
        "KL mean",
        *(f"loss {n}" for n in names),
        "loss mean",
    ]
    bars = [(name, score["mean_kl"], f"{score['mean_kl']:.4f}") for name, score in scores.items()]
    chart = figure("Mean held-out KL.", charts.side_bars("Mean held-out KL", bars))
    return section(title, how, summary, chart, Table(heads, rows, right=len(heads) - 1))


def _curves(training: Json) -> Section:
    history, measured = training["history"], training["measured"]
    if not history:
        return section("Training", "", "No step was taken.")
    names = list(history[0]["terms"])
    weights = dict(training["dials"]["loss"])
    if training["dials"].get("rollouts"):
        weights[ROLLOUTS_TERM] = training["dials"]["rollouts"]["weight"]
    parts = _spread(len(history))
    axis = _steps_axis([history[part[-1]]["step"] + 1 for part in parts])

    def loss(step: Json, dataset: str) -> float:
        return float(sum(weights[term] * v for term, v in step["terms"][dataset].items()))

    series = [
        Series(name, [sum(loss(history[i], name) for i in part) / len(part) for part in parts], n)
        for n, name in enumerate(names[: charts.MAX_LINES])
    ]
    figures = [
        figure(
            "Training loss by data set, means over steps.",
            charts.lines("Training loss", axis, series, three_digits, "loss"),
        )
    ]
    if measured:
        axis = _steps_axis([step["step"] for step in measured])
        series = [
            Series(name, [item["kl"][name] for item in measured], n)
            for n, name in enumerate(list(measured[0]["kl"])[: charts.MAX_LINES])
        ]
        series.append(Series("mean", [step["mean_kl"] for step in measured], "merged"))
        chart = charts.lines("Held-out KL", axis, series, three_digits, "nats")
        figures.append(figure("Held-out KL by data set.", chart))
    last = history[-1]
    terms = [f"{name} {value:.4g}" for name, value in last["penalties"].items()]
    summary = f"{count(training['steps'], 'step')}, ended: {training['ended']}"
    summary += f"; the coefficients of step {training['best_step']} were kept"
    summary += f"; last penalties: {', '.join(terms)}" if terms else ""
    return section("Training", "", f"{summary}.", *figures)


def _training_cost(training: Json) -> Section:
    cost = training["cost"]
    rows = [
        ("coefficients", f"{training['coefficients']:,}"),
        ("training", duration(cost["seconds"])),
        ("teachers", duration(cost["teaching_seconds"])),
        ("tokens", f"{cost['tokens']:,}"),
        ("tokens/s", f"{cost['tokens'] / cost['seconds']:,.0f}" if cost["seconds"] else "–"),
        ("forward and backward passes", f"{cost['passes']:,}"),
        ("held-out passes", f"{cost['held_out_passes']:,}"),
        ("peak memory, resident", size(cost["peak_rss"])),
        *([("peak memory, GPU", size(cost["peak_vram"]))] if cost["peak_vram"] else []),
        ("student", size(cost["student_bytes"])),
        ("sources", f"{size(cost['source_bytes'])}, {cost['residency']}"),
        ("processes", f"{cost['processes']}, {size(cost['bytes_reduced'])} of gradients added up"),
    ]
    why = [[name, reason] for name, reason in training["why"].items()]
    data = [
        [
            item["name"],
            item["teacher"],
            f"{item['rows']:,}",
            f"{item['train']:,}",
            f"{item['held_out']:,}",
            f"{item['train_tokens']:,}",
        ]
        for item in training["datasets"]
    ]
    heads = ["data", "teacher", "rows", "train", "held out", "tokens"]
    return section(
        "What learning cost",
        "",
        "",
        Table(["", ""], rows, right=1),
        Table(heads, data, right=4),
        Table(["decided", "why"], why),
    )


def _spread(length: int) -> list[list[int]]:
    """Numbers 0 to length in at most `_POINTS` runs."""
    step = -(-length // _POINTS)
    return [list(range(i, min(i + step, length))) for i in range(0, length, step)]


def _steps_axis(steps: Sequence[int]) -> Axis:
    width = max(12.0, min(56.0, 700 / max(1, len(steps))))
    every = max(1, -(-44 // int(width)))
    ticks = [str(step) if i % every == 0 else "" for i, step in enumerate(steps)]
    return Axis([f"step {step}" for step in steps], ticks, "step", width)


def coefficient_summary(plan: Plan) -> dict[str, Any]:
    """Mean coefficients by group of tensors and source, weighted by elements."""
    file = plan.coefficients
    assert file is not None, "only a merge with coefficients has a summary of them"
    groups: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for task in plan.tasks:
        if task.action != "merge":
            continue
        coefficients = file.of(task.name, task.shape)
        size = math.prod(task.shape)
        total = groups.setdefault(task.group, [0.0] * len(task.operands))
        sizes[task.group] = sizes.get(task.group, 0) + size
        for i in range(len(task.operands)):
            total[i] += coefficients.mean(i) * size
    return {
        "form": file.form,
        "digest": file.digest,
        "models": short_labels([plan.sources[i].label for i in plan.operands]),
        "groups": [
            {
                "name": name,
                "layer": layer.number if (layer := layer_key_of(f"{name}.x")) else None,
                "count": sizes[name],
                "mean": [_rounded(value / sizes[name]) for value in total] if sizes[name] else [],
            }
            for name, total in groups.items()
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
