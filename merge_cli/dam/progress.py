"""What is told of each step: a line with losses, pace, memory, time left; TensorBoard scalars."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_cli.dam.checkpoint import Position
from merge_cli.dam.distributed import World
from merge_cli.dam.plan import TrainingPlan
from merge_cli.engine.memory import peak_rss
from merge_cli.engine.options import OnProgress, Progress
from merge_cli.sizes import show_seconds, show_size

_RECENT = 20  # steps whose mean is shown


class StepLine:
    """Told of every step; tells `show` what a person wants to know.

    Args:
        board: the folder for TensorBoard's files; None writes none. Nothing is sent anywhere.
    """

    def __init__(
        self, decided: TrainingPlan, board: Path | None, show: OnProgress, world: World
    ) -> None:
        self._decided, self._show = decided, show
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
        loss = sum(one["loss"] for one in recent) / len(recent)
        parts = [f"loss {loss:.4g}"]
        parts += [
            f"{name} {sum(self._weighted(one, name) for one in recent) / len(recent):.3g}"
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
        self._show(Progress("train", position.step, self._decided.steps, note, "steps"))
        if self._writer is not None:
            self._write(record, position)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _weighted(self, record: Mapping[str, Any], name: str) -> float:
        weights = self._decided.training.loss
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
