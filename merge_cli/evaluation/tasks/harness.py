"""A task of the Language Model Evaluation Harness, run in-process on the live model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import MergeCliError, SourceError, UsageError
from merge_cli.evaluation.chat import SYSTEM_WITHOUT_CHAT, require_template
from merge_cli.evaluation.forward import watched
from merge_cli.evaluation.guards import quiet_libraries
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Better, Metric, TaskResult
from merge_cli.evaluation.task import OnProgress, Task, cut_note
from merge_cli.evaluation.tasks.harness_model import harness_model
from merge_cli.recipe.forms import Text
from merge_cli.recipe.sections import option


@dataclass(frozen=True, kw_only=True)
class Harness(Task):
    """`lm_eval: NAME`; needs the extra `lm-eval`, and the task's data where it looks for them."""

    kind = "lm_eval"

    lm_eval: str = option(help="the harness's name of the task", form=Text(line=True))
    include: Path | None = option(None, "a folder with task files of your own")
    num_fewshot: int | None = option(None, "examples before the question", least=0)
    metric: str = option("", "the primary metric; default the task's first")
    chat_template: bool = option(False, "ask with the tokenizer's chat template")
    system: str = option("", "what a conversation begins with; needs chat_template")
    fewshot_as_multiturn: bool = option(
        True, "with chat_template: examples are turns of the conversation, not one text"
    )

    # Only the harness knows where its data are, and whether they have changed.
    is_cached = False

    def __post_init__(self) -> None:
        if self.system and not self.chat_template:
            raise ValueError(SYSTEM_WITHOUT_CHAT)

    def files(self) -> tuple[Path, ...]:
        return () if self.include is None else tuple(self.include.rglob("*"))

    def data_digest(self) -> str:
        return ""

    def check_data(self, seed: int) -> None:
        self._task_manager()

    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        manager = self._task_manager()
        from lm_eval import simple_evaluate

        on_progress(0, 1)
        with quiet_libraries():
            if self.chat_template:
                require_template(live.tokenizer, live.label)
            model = harness_model(live)
            with watched(live):
                try:
                    result = simple_evaluate(
                        model=model,
                        tasks=[self.lm_eval],
                        num_fewshot=self.num_fewshot,
                        limit=self.limit,
                        task_manager=manager,
                        bootstrap_iters=0,
                        log_samples=True,
                        random_seed=live.seed,
                        numpy_random_seed=live.seed,
                        torch_random_seed=live.seed,
                        fewshot_random_seed=live.seed,
                        apply_chat_template=self.chat_template,
                        system_instruction=self.system or None,
                        fewshot_as_multiturn=self.chat_template and self.fewshot_as_multiturn,
                    )
                except MergeCliError:  # about the model, and not about the task
                    raise
                except (
                    Exception,
                    SystemExit,
                ) as error:  # tasks are code and templates that can raise anything
                    message = f"lm-eval cannot run '{self.lm_eval}': {error}"
                    raise SourceError(message, model=live.label) from error
        on_progress(1, 1)
        all_samples = [
            sample for name in sorted(result["samples"]) for sample in result["samples"][name]
        ]
        metrics, kind = self._metrics(result, all_samples)
        samples = [sample for sample in all_samples if sample.get("filter") in (None, kind)]
        examples = [
            {
                "document": s["doc_id"],
                "target": s["target"],
                "responses": s["filtered_resps"],
                **{name: s[name] for name in metrics if name in s},
            }
            for s in samples
        ]
        notes = cut_note(
            model.cut, model.asked, "requests are: their beginning was cut", live.max_length
        )
        return TaskResult(self.name, self.kind, metrics, examples, notes=notes)

    def _task_manager(self) -> Any:
        """The harness's list of tasks, with this one in it.

        Raises:
            UsageError: the harness is not installed, or has no such task.
        """
        _require()
        from lm_eval.tasks import TaskManager

        with quiet_libraries():
            manager = TaskManager(include_path=str(self.include) if self.include else None)
        if self.lm_eval not in manager.all_subtasks:
            message = f"lm-eval has no task '{self.lm_eval}'"
            if self.lm_eval in manager.all_tasks:
                message = f"lm-eval's '{self.lm_eval}' is a group of tasks"
            hint = "lm-eval ls tasks lists them; `include` adds a folder of your own."
            raise UsageError(message, hint=hint)
        return manager

    def _metrics(
        self, output: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Metric], str]:
        """Every metric of the task, and the name of the first one's filter.

        The harness scores each document once for every filter. A metric that is no mean of its
        examples has no interval.
        """
        results, higher_is_better = (
            output["results"][self.lm_eval],
            output["higher_is_better"][self.lm_eval],
        )
        metrics: dict[str, Metric] = {}
        filters: dict[str, str] = {}
        for key, value in results.items():
            name, _, kind = key.partition(",")
            if (
                name in metrics
                or name not in higher_is_better
                or not isinstance(value, float | int)
            ):
                continue
            better: Better = "higher" if higher_is_better[name] else "lower"
            parts = [s.get(name) for s in samples if s.get("filter") in (None, kind)]
            numbers = [float(part) for part in parts if isinstance(part, float | int)]
            mean = sum(numbers) / len(numbers) if numbers else math.nan
            if len(numbers) != len(parts) or not math.isclose(mean, value, abs_tol=1e-9):
                numbers = [float(value)]
            metrics[name] = Metric(name, "by lm-eval", better, numbers, [1.0] * len(numbers))
            filters[name] = kind
        if not metrics or self.metric and self.metric not in metrics:
            names = ", ".join(metrics) or "none"
            raise UsageError(
                f"lm-eval's '{self.lm_eval}' has no metric '{self.metric}' (it has {names})"
            )
        first = self.metric or next(iter(metrics))
        return {first: metrics[first], **metrics}, filters[first]


def _require() -> None:
    """
    Raises:
        UsageError: the harness is not installed.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        hint = "pip install 'merge-cli[lm-eval]'"
        raise UsageError("lm_eval tasks need the package lm-eval", hint=hint)
