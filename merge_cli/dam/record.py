"""The record of a training: what the report shows, and whether it was worth it.

What is told of each step: a line with losses, pace, memory, time left; TensorBoard scalars.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_cli.dam.checkpoint import Position
from merge_cli.dam.data import Dataset
from merge_cli.dam.distributed import World
from merge_cli.dam.plan import TrainingPlan
from merge_cli.engine.memory import peak_rss
from merge_cli.errors import GateError
from merge_cli.options import OnProgress, Progress
from merge_cli.recipe.training import ROLLOUTS_TERM, plain_training
from merge_cli.system.machine import show_seconds, show_size

LEARNED = "dam"


def build_record(
    decided: TrainingPlan, position: Position, note: str, world: World
) -> dict[str, Any]:
    """JSON-ready; docs/dam.md says what each part is."""
    scores = dict(position.static or {})
    best = next((m for m in position.measured or [] if m["step"] == position.best_step), None)
    if best is not None:
        scores = {LEARNED: {k: v for k, v in best.items() if k != "step"}, **scores}
    warnings = [note] if note else []
    unused = decided.training.unused_patterns([target.name for target in decided.targets])
    warnings += [f"granularity: no tensor has '{pattern}' in its name" for pattern in unused]
    warnings += [
        f"{data.name}: {data.removed:,} of {data.rows:,} rows are held out, too: not trained on"
        for data in decided.datasets
        if data.removed
    ]
    warnings += [
        f"{name} predicts NaN or Inf on held-out rows, and is compared with nothing"
        for name in position.broken or []
    ]
    verdict = improvement(position.tested or {}) or improvement(scores)
    lacking = ", ".join(data.name for data in decided.datasets if not data.held_out)
    if lacking and verdict is not None:
        warnings.append(f"no rows are held out of {lacking}: nothing that is measured speaks of it")
    if verdict is None:
        warnings.append(
            f"no rows are held out of {lacking}: whether the result is better is not known"
        )
    elif verdict["ratio"] >= 1:
        warnings.append(
            f"NO IMPROVEMENT: held-out KL {verdict['kl']:.4g}, and {verdict['best_static']} "
            f"without training {verdict['best_static_kl']:.4g}"
        )
    return {
        "dials": plain_training(decided.training),
        "start": position.start,
        "why": {**decided.why, **_start(decided, position)},
        "coefficients": decided.coefficients,
        "datasets": [
            {
                "name": dataset.name,
                "teacher": decided.labels[dataset.source],
                **_origin(decided, dataset),
                "rows": dataset.rows,
                "train": len(dataset.train),
                "held_out": len(dataset.held_out),
                "test": len(dataset.test),
                "removed": dataset.removed,
                "train_tokens": sum(item.counted for item in dataset.train),
                "held_out_tokens": sum(item.counted for item in dataset.held_out),
            }
            for dataset in decided.datasets
        ],
        "steps": position.step,
        "ended": position.ended,
        "best_step": position.best_step if best is not None else position.step,
        "history": position.history,
        "measured": position.measured,
        "scores": scores,
        "test_scores": position.tested or {},
        "verdict": verdict,
        "warnings": warnings,
        "cost": {
            "seconds": round(position.seconds, 3),
            "teaching_seconds": round(position.teaching, 3),
            "tokens": position.tokens,
            "passes": position.passes,
            "held_out_passes": position.held_out_passes,
            "peak_rss": peak_rss(),
            "peak_vram": _peak_vram(decided.device),
            "student_bytes": decided.student_bytes,
            "source_bytes": decided.residency.bytes,
            "residency": decided.residency.residency,
            "processes": world.size,
            "bytes_reduced": position.bytes_reduced,
        },
    }


def _start(decided: TrainingPlan, position: Position) -> dict[str, str]:
    if not position.start:
        return {}
    best = decided.training.start == "best"
    why = "the best without training on held-out rows" if best else "asked for"
    left_out = decided.why.get("start")
    return {"start": f"{position.start}, {why}" + (f"; {left_out}" if left_out else "")}


def _origin(decided: TrainingPlan, dataset: Dataset) -> dict[str, Any]:
    """Where a data set is from, as the recipe says it, and what it came to."""
    plan = decided.plan
    label = plan.sources[plan.operands[dataset.source]].label
    data = next(s.data for s in plan.recipe.source_specs if str(s.model) == label)
    assert data is not None, "a data set is a source's data"
    address = f"{data.dataset}@{data.revision or 'main'}, {data.split}" if data.dataset else ""
    return {
        "files": [*data.files, *([address] if address else [])],
        "held_out_files": list(data.held_out),
        "digest": dataset.digest,
    }


def improvement(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The learned merge against the best that needs no training; None where nothing was measured.

    A single source counts, too: a merge that is further from the teachers than one of them is none.
    """
    static = {name: score["mean_kl"] for name, score in scores.items() if name != LEARNED}
    if LEARNED not in scores or not static:
        return None
    name = min(static, key=lambda name: static[name])
    kl = scores[LEARNED]["mean_kl"]
    ratio = kl / static[name] if static[name] else float("inf")
    return {"kl": kl, "best_static": name, "best_static_kl": static[name], "ratio": ratio}


def gate(record: Mapping[str, Any], required: bool, coefficients: Path) -> None:
    """Raise where improvement is required and there is none.

    Raises:
        GateError: worse than, or as good as, the best static merge; or nothing was measured.
    """
    verdict = record["verdict"]
    if not required or (verdict is not None and verdict["ratio"] < 1):
        return
    message = "improvement is required, and nothing was held out to show it"
    if verdict is not None:
        message = (
            f"held-out KL {verdict['kl']:.4g} is no better than {verdict['best_static']} "
            f"without training ({verdict['best_static_kl']:.4g})"
        )
    hint = "Train longer or on more data, or run without --require-improvement."
    raise GateError(message, where=str(coefficients), hint=hint)


def _peak_vram(device: str) -> int | None:
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


_RECENT = 20  # steps whose mean is shown


class StepLine:
    """Told of every step; tells `on_progress` what a person wants to know.

    Args:
        board: the folder for TensorBoard's files; None writes none. Nothing is sent anywhere.
    """

    def __init__(
        self, decided: TrainingPlan, board: Path | None, on_progress: OnProgress, world: World
    ) -> None:
        self._decided, self._on_progress = decided, on_progress
        self._began, self._first_step, self._first_tokens = time.monotonic(), -1, 0
        self._writer: Any = None
        if board is not None and world.first:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(board))

    def __call__(self, record: Mapping[str, Any], position: Position) -> None:
        if self._first_step < 0:
            self._first_step, self._first_tokens = position.step - 1, 0
            self._tokens_before = position.tokens
        assert position.history is not None
        recent = position.history[-_RECENT:]
        loss = sum(item["loss"] for item in recent) / len(recent)
        parts = [f"loss {loss:.4g}"]
        parts += [
            f"{name} {sum(self._weighted(step, name) for step in recent) / len(recent):.3g}"
            for name in record["terms"]
        ]
        if position.measured:
            parts.append(f"held-out KL {position.measured[-1]['mean_kl']:.4g}")
        seconds = time.monotonic() - self._began
        done = position.step - self._first_step
        tokens = position.tokens - self._tokens_before
        if done > 1 and tokens:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        parts.append(show_size(self._memory()))
        left = seconds / done * (self._decided.steps - position.step)
        parts.append(f"{show_seconds(left)} left")
        note = " · ".join(parts)
        self._on_progress(Progress("train", position.step, self._decided.steps, note, "steps"))
        if self._writer is not None:
            self._write(record, position)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _weighted(self, record: Mapping[str, Any], name: str) -> float:
        training = self._decided.training
        weights = dict(training.loss)
        if training.rollouts is not None:
            weights[ROLLOUTS_TERM] = training.rollouts.weight
        return float(sum(weights[term] * v for term, v in record["terms"][name].items()))

    def _memory(self) -> int:
        """The most that was used: of the device's memory where there is one."""
        if self._decided.device == "cpu":
            return peak_rss()
        import torch

        return int(torch.cuda.max_memory_allocated(self._decided.device))

    def _write(self, record: Mapping[str, Any], position: Position) -> None:
        step = position.step
        self._writer.add_scalar("loss", record["loss"], step)
        self._writer.add_scalar("rate", record["rate"], step)
        for dataset, terms in record["terms"].items():
            for name, value in terms.items():
                self._writer.add_scalar(f"{name}/{dataset}", value, step)
        for name, value in record["penalties"].items():
            self._writer.add_scalar(f"penalty/{name}", value, step)
        if position.measured and position.measured[-1]["step"] == step:
            self._writer.add_scalar("held-out/kl", position.measured[-1]["mean_kl"], step)
