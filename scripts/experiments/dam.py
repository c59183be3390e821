"""DAM against merges that learn nothing, on the model family in zoo/.

    python scripts/experiments/dam.py              # about 25 minutes on one idle core
    python scripts/experiments/dam.py --report     # tables and figures again

1. Static merges of the japanese, math and code experts: uniform soup, task arithmetic, TIES, DARE,
   each at the best of a small grid, chosen by mean KL on the validation split.
2. DAM in several settings, three seeds for all but one (the seed decides which rows are learned
   from and in what order). Teachers and coefficients see the train split; the step that is kept is
   chosen on the validation split, as the grids' settings are.
3. Everything on the test split, by `merge_cli.evaluate`: KL(expert || model) over the whole
   vocabulary on the expert's own data, and loss, nats per token.

Writes docs/experiments/dam.json, dam-*.svg, and the tables in dam.md. matplotlib draws (the extra
`experiments`). What is finished is kept in --work and not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import merge_cli
from merge_cli.engine.merge import MergeOptions
from merge_cli.evaluation.task import Task
from merge_cli.evaluation.tasks import KL, LossTask

ROOT = Path(__file__).resolve().parents[2]
ZOO, DOCS = ROOT / "zoo", ROOT / "docs" / "experiments"
EXPERTS = ("japanese", "math", "code")
SEEDS = (0, 1, 2)
# Rows of each data set: maths rows are short. About as many tokens of each.
VAL_ROWS = {"japanese": 12, "math": 80, "code": 12}
TEST_ROWS = {"japanese": 24, "math": 160, "code": 24}
LENGTH = 256

GRIDS: dict[str, list[dict[str, Any]]] = {
    "uniform soup": [{"method": "soup"}],
    "task arithmetic": [
        {"method": "task_arithmetic", "lambda": x}
        for x in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    ],
    "TIES": [
        {"method": "ties", "density": d, "lambda": x}
        for d in (0.2, 0.5)
        for x in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    ],
    "DARE": [
        {"method": "dare", "density": d, "lambda": x}
        for d in (0.5, 0.9)
        for x in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    ],
}
USUAL: dict[str, Any] = {
    "max_length": 128,
    "examples": 240,
    "batch_size": 4,
    "schedule": "cosine",
    "held_out_examples": 24,
}
LEARNED: dict[str, dict[str, Any]] = {
    "DAM (task vectors)": {"form": "task_vector", "learning_rate": 2e-2},
    "DAM (soup, base among the sources)": {"learning_rate": 2e-3, "with_base": True},
    "DAM (soup of the experts)": {"learning_rate": 2e-3},
    "one coefficient for each tensor": {
        "form": "task_vector",
        "granularity": "tensor",
        "learning_rate": 2e-2,
    },
}
ONE_SEED = ("DAM (soup of the experts)",)


class Experiment:
    """What is measured once is kept: models in `work`, numbers in results.json."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self._file = work / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def once(self, key: str, make: Any) -> Any:
        if key not in self.results:
            began = time.monotonic()
            self.results[key] = make()
            self._file.write_text(json.dumps(self.results, indent=1))
            print(f"{key}: {time.monotonic() - began:.0f} s", flush=True)
        return self.results[key]

    def merge(self, name: str, recipe: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        out = self.work / "models" / name
        if out.exists():
            return out, json.loads((out / "merge_report.json").read_text())
        out.parent.mkdir(exist_ok=True)
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        options = MergeOptions(device="cpu", threads=1, statistics=False)
        result = merge_cli.merge(path, out, options=options)
        return out, result.report

    def score(self, model: Path, split: str, *, loss: bool) -> dict[str, Any]:
        rows = TEST_ROWS if split == "test" else VAL_ROWS
        tasks: list[Task] = []
        for name in EXPERTS:
            data = ZOO / "data" / f"{name}.{split}.jsonl"
            about: dict[str, Any] = {"data": data, "limit": rows[name]}
            tasks.append(KL(name=f"kl {name}", teacher=str(ZOO / name), **about))
            if loss:
                tasks.append(LossTask(name=f"loss {name}", **about))
        found = merge_cli.evaluate(model, tasks, device="cpu", max_length=LENGTH)
        return {name: task.value for name, task in found.tasks.items()}


def static_recipe(setting: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    method = setting["method"]
    own = {k: v for k, v in setting.items() if k == "density"}
    return {
        "merge_method": method,
        **({} if method == "soup" else {"base_model": str(ZOO / "base")}),
        "models": [
            {"model": str(ZOO / name), **({"parameters": own} if own else {})} for name in EXPERTS
        ],
        **({"parameters": {"lambda": setting["lambda"]}} if "lambda" in setting else {}),
        "dtype": "float32",
        "seed": seed,
    }


def learned_recipe(dials: Mapping[str, Any], seed: int) -> dict[str, Any]:
    own = {"preset": "dam", **USUAL, **{k: v for k, v in dials.items() if k != "with_base"}}
    data = ZOO / "data"
    models: list[dict[str, Any]] = [
        {
            "model": str(ZOO / name),
            "data": {
                "files": str(data / f"{name}.train.jsonl"),
                "held_out": str(data / f"{name}.val.jsonl"),
            },
        }
        for name in EXPERTS
    ]
    if dials.get("with_base"):
        models.append({"model": str(ZOO / "base")})
    return {
        "merge_method": "dam",
        "base_model": str(ZOO / "base"),
        "models": models,
        "training": own,
        "dtype": "float32",
        "seed": seed,
    }


def mean_kl(scores: Mapping[str, float]) -> float:
    return statistics.mean(scores[f"kl {name}"] for name in EXPERTS)


def run_all(experiment: Experiment) -> None:
    for name in ("base", *EXPERTS):
        experiment.once(f"test {name}", lambda n=name: experiment.score(ZOO / n, "test", loss=True))
    for family, grid in GRIDS.items():
        for setting in grid:

            def on_val(setting: Any = setting) -> dict[str, Any]:
                out, _ = experiment.merge(label_of(setting, "-"), static_recipe(setting))
                return {"setting": setting, **experiment.score(out, "val", loss=False)}

            experiment.once(f"val {family}: {label_of(setting)}", on_val)
        best = best_setting(experiment.results, family)
        for seed in SEEDS if family == "DARE" else SEEDS[:1]:

            def on_test(best: Any = best, seed: int = seed) -> dict[str, Any]:
                name = f"{label_of(best, '-')}-seed{seed}"
                out, _ = experiment.merge(name, static_recipe(best, seed))
                return {"setting": best, **experiment.score(out, "test", loss=True)}

            experiment.once(f"test {family}: {label_of(best)} seed {seed}", on_test)
    for name, seed in learned_runs():

        def learn(name: str = name, seed: int = seed) -> dict[str, Any]:
            out, report = experiment.merge(
                f"dam-{tuple(LEARNED).index(name)}-{seed}", learned_recipe(LEARNED[name], seed)
            )
            training = report["training"]
            keep = ("steps", "best_step", "measured", "cost", "coefficients")
            return {
                "training": {key: training[key] for key in keep},
                "groups": report["coefficients"]["groups"],
                **experiment.score(out, "test", loss=True),
            }

        experiment.once(f"test {name} seed {seed}", learn)


def learned_runs() -> Iterator[tuple[str, int]]:
    for seed in SEEDS:
        for name in LEARNED:
            if seed == SEEDS[0] or name not in ONE_SEED:
                yield name, seed


def label_of(setting: Mapping[str, Any], between: str = " ") -> str:
    """A setting of a grid in a few words."""
    return between.join(f"{v:g}" if isinstance(v, float) else str(v) for v in setting.values())


def best_setting(results: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The setting of the grid with the lowest mean KL on the validation split."""
    tried = [value for key, value in results.items() if key.startswith(f"val {family}:")]
    return dict(min(tried, key=mean_kl)["setting"])


def table(results: Mapping[str, Any]) -> str:
    """Markdown: means over seeds, and the spread where there are several."""
    heads = [f"KL {n}" for n in EXPERTS] + ["KL mean"] + [f"loss {n}" for n in EXPERTS]
    lines = [f"| model | seeds | {' | '.join([*heads, 'loss mean'])} |", "|---|---:|" + "---:|" * 8]
    for name, runs in rows(results):
        cells = []
        for kind in ("kl", "loss"):
            columns = [[run[f"{kind} {n}"] for run in runs] for n in EXPERTS]
            columns.append([statistics.mean(run) for run in zip(*columns, strict=True)])
            digits = 4 if kind == "kl" else 3
            cells += [_cell(values, digits) for values in columns]
        setting = runs[0].get("setting", {})
        shown = ", ".join(f"{k} {v:g}" for k, v in setting.items() if k != "method")
        lines.append(
            f"| {name}{f' ({shown})' if shown else ''} | {len(runs)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name in ("base", *EXPERTS):
        yield name, [results[f"test {name}"]]
    for name in (*GRIDS, *LEARNED):
        key = f"{name}: {label_of(best_setting(results, name))}" if name in GRIDS else name
        runs = [results.get(f"test {key} seed {seed}") for seed in SEEDS]
        found = [run for run in runs if run is not None]
        if found:
            yield name, found


def costs(results: Mapping[str, Any]) -> str:
    lines = [
        "| setting | coefficients | steps | tokens | seconds | tokens/s | kept step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in LEARNED:
        found = [
            results[key]["training"] for s in SEEDS if (key := f"test {name} seed {s}") in results
        ]
        for one in found[:1]:
            cost = one["cost"]
            kept = ", ".join(str(run["best_step"]) for run in found)
            lines.append(
                f"| {name} | {one['coefficients']:,} | {one['steps']} | {cost['tokens']:,} | "
                f"{cost['seconds']:.0f} | {cost['tokens'] / cost['seconds']:,.0f} | {kept} |"
            )
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def draw(results: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "merge-cli"
    names, means, spreads = [], [], []
    for name, runs in rows(results):
        values = [mean_kl(run) for run in runs]
        names.append(name)
        means.append(statistics.mean(values))
        spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    colours = ["tab:blue" if name in LEARNED else "tab:gray" for name in names]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.barh(names[::-1], means[::-1], xerr=spreads[::-1], color=colours[::-1], capsize=3)
    axes.set_xlabel("mean KL(expert ‖ model) on test, nats per token")
    figure.savefig(DOCS / "dam-kl.svg", metadata={"Date": None})

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, name in enumerate(LEARNED):
        for seed in SEEDS:
            run = results.get(f"test {name} seed {seed}")
            if run is None:
                continue
            measured = run["training"]["measured"]
            axes.plot(
                [m["step"] for m in measured],
                [m["mean_kl"] for m in measured],
                color=f"C{number}",
                alpha=1.0 if seed == 0 else 0.5,
                label=name if seed == 0 else None,
                marker="o",
                markersize=3,
            )
    axes.set_xlabel("step (4 examples of each expert)")
    axes.set_ylabel("mean KL on validation, 65 bins")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(DOCS / "dam-training.svg", metadata={"Date": None})

    groups = results[f"test {next(iter(LEARNED))} seed 0"]["groups"]
    layers = sorted((g for g in groups if g["layer"] is not None), key=lambda g: g["layer"])
    shown = [g for g in groups if g["name"].endswith("embed_tokens.weight")] + layers
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    values = [[g["mean"][i] for g in shown] for i in range(len(EXPERTS))]
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    bright = 0.6 * max(map(max, values)) + 0.4 * min(map(min, values))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ink = "black" if value > bright else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink)
    axes.set_yticks(range(len(EXPERTS)), EXPERTS)
    axes.set_xticks(range(len(shown)), ["embedding", *(f"layer {g['layer']}" for g in layers)])
    figure.colorbar(image, label="mean coefficient")
    figure.savefig(DOCS / "dam-coefficients.svg", metadata={"Date": None})


def write_page(results: Mapping[str, Any]) -> None:
    """The generated parts of dam.md, between their markers."""
    page = DOCS / "dam.md"
    text = page.read_text(encoding="utf-8")
    for name, content in (("results", table(results)), ("cost", costs(results))):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "experiments" / "dam")
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    given = parser.parse_args()
    experiment = Experiment(given.work)
    if not given.report:
        import torch

        torch.set_num_threads(1)
        run_all(experiment)
    DOCS.mkdir(parents=True, exist_ok=True)
    for result in experiment.results.values():
        result.get("training", {}).pop("scores", None)
    (DOCS / "dam.json").write_text(json.dumps(experiment.results, indent=1) + "\n")
    draw(experiment.results)
    write_page(experiment.results)
    print(table(experiment.results))


if __name__ == "__main__":
    main()
