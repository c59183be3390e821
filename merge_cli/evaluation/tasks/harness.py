"""A task of the Language Model Evaluation Harness, run in-process on the live model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import SourceError, UsageError
from merge_cli.evaluation.live import LiveModel, counted, quiet
from merge_cli.evaluation.result import Better, Metric, TaskResult
from merge_cli.evaluation.task import Task, Tell, file_digest, option


@dataclass(frozen=True, kw_only=True)
class Harness(Task):
    """`lm_eval: NAME`; needs the extra `lm-eval`, and the task's data where it looks for them."""

    kind = "lm_eval"

    lm_eval: str = option(help="the harness's name of the task")
    include: Path | None = option(None, "a folder with task files of your own")
    num_fewshot: int | None = option(None, "examples before the question", least=0)
    metric: str = option("", "the primary metric; default the task's first")

    unshared = Task.unshared | {"include", "metric"}

    def data_digest(self) -> str:
        """Of the included files; the harness's own tasks are known by its version."""
        state = hashlib.sha256(_version().encode())
        files = sorted(p for p in self.include.rglob("*") if p.is_file()) if self.include else []
        for file in files:
            state.update(file.name.encode() + file_digest(file).encode())
        return state.hexdigest()

    def score(self, live: LiveModel, tell: Tell) -> TaskResult:
        _version()
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        tell(0, 1)
        folder = str(self.include) if self.include else None
        with quiet():
            manager = TaskManager(include_path=folder)
            if self.lm_eval not in manager.all_tasks:
                hint = "lm-eval ls tasks lists them; `include` adds a folder of your own."
                raise UsageError(f"lm-eval has no task '{self.lm_eval}'", hint=hint)
            model = HFLM(
                pretrained=live.net, tokenizer=live.tokenizer, max_length=live.max_length,
                batch_size=max(1, live.batch_tokens // live.max_length),
            )  # fmt: skip
            with counted(live):
                try:
                    found = simple_evaluate(
                        model=model, tasks=[self.lm_eval], num_fewshot=self.num_fewshot,
                        limit=self.limit, task_manager=manager, bootstrap_iters=0,
                        log_samples=True, random_seed=live.seed, numpy_random_seed=live.seed,
                        torch_random_seed=live.seed, fewshot_random_seed=live.seed,
                    )  # fmt: skip
                except (OSError, ValueError, ConnectionError) as error:
                    what = f"lm-eval cannot run '{self.lm_eval}': {error}"
                    raise SourceError(what, model=live.label) from error
        tell(1, 1)
        samples = [sample for name in sorted(found["samples"]) for sample in found["samples"][name]]
        metrics = self._metrics(found, samples)
        examples = [
            {"document": s["doc_id"], "target": s["target"], "responses": s["filtered_resps"],
             **{name: s[name] for name in metrics if name in s}}
            for s in samples
        ]  # fmt: skip
        return TaskResult(self.name, self.kind, metrics, examples)

    def _metrics(
        self, found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> dict[str, Metric]:
        """Every metric of the task; one that is no mean of its examples has no interval."""
        results, up = found["results"][self.lm_eval], found["higher_is_better"][self.lm_eval]
        metrics: dict[str, Metric] = {}
        for key, value in results.items():
            name = key.partition(",")[0]
            if name in metrics or name not in up or not isinstance(value, float | int):
                continue
            better: Better = "higher" if up[name] else "lower"
            parts = [sample.get(name) for sample in samples]
            numbers = [float(part) for part in parts if isinstance(part, float | int)]
            mean = sum(numbers) / len(numbers) if numbers else math.nan
            if len(numbers) != len(parts) or not math.isclose(mean, value, abs_tol=1e-9):
                numbers = [float(value)]
            metrics[name] = Metric(name, "by lm-eval", better, numbers, [1.0] * len(numbers))
        if not metrics or self.metric and self.metric not in metrics:
            has = ", ".join(metrics) or "none"
            raise UsageError(
                f"lm-eval's '{self.lm_eval}' has no metric '{self.metric}' (it has {has})"
            )
        first = self.metric or next(iter(metrics))
        return {first: metrics[first], **metrics}


def _version() -> str:
    """The harness's version.

    Raises:
        UsageError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        hint = "pip install 'merge-cli[lm-eval]'"
        raise UsageError("lm_eval tasks need the package lm-eval", hint=hint) from None
