"""`merge_cli.evaluate`: score models on tasks; a model is loaded only if results are missing."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.engine.device import choose_device
from merge_cli.errors import Interrupted, NonFiniteError, UsageError
from merge_cli.evaluation import cache
from merge_cli.evaluation.fingerprints import refuse_changed, source_fingerprint
from merge_cli.evaluation.guards import memory_errors
from merge_cli.evaluation.live import LiveModel, choose_dtype, load
from merge_cli.evaluation.parse import parse_eval, read_eval
from merge_cli.evaluation.result import Cost, Evaluation, TaskResult
from merge_cli.evaluation.spec import EvalSpec, default_name
from merge_cli.evaluation.task import Task
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.options import OnProgress, Progress
from merge_cli.recipe.reference import parse_reference
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.opening import open_source
from merge_cli.sources.result_files import refuse_replacing
from merge_cli.sources.source import Source, fetch_weights
from merge_cli.system.machine import torch_threads
from merge_cli.system.raw_io import write_error

_SMALLER = "Try a smaller --batch-tokens or --max-length, or --dtype bfloat16."


def _silent(progress: Progress) -> None:
    pass


def evaluate(
    model: str | Path,
    tasks: str | Path | EvalSpec | Sequence[str | Path | Task],
    *,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a model.

    Args:
        model: a folder, or a Hub id.
        tasks: an evaluation file (.yaml); a data file, for its loss; several; or tasks.
        limit: at most so many rows of each task, a random sample.
        on_progress: called with progress.
        settings: fields of `EvalSpec`: device, dtype, max_length, batch_tokens, seed, cache.

    Returns:
        per task its metrics with their examples: `evaluation["math"].value`.

    Raises:
        RecipeError: an invalid evaluation file.
        SourceError: a model or data that cannot be used, a row without what the task needs.
        ResourceError: the device or a package is missing.
    """
    spec = as_spec(tasks).changed(**settings).limited(limit)
    return evaluate_all([str(model)], spec, on_progress or _silent)[str(model)]


def evaluate_all(
    models: Sequence[str],
    spec: EvalSpec,
    on_progress: OnProgress = _silent,
    *,
    results: Mapping[str, Path | None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate several models on the same tasks; all are opened before any is run.

    Args:
        results: option -> the file that will be written; none may be one that is read.

    Raises:
        UsageError: a result would replace what is read.
        SourceError: a model that cannot be opened or scored.
        Interrupted: by Ctrl-C; finished tasks are in the cache.
    """
    sources = {name: _open_model(name, Path.cwd()) for name in models}
    if results and any(results.values()):
        refuse_replacing(results, [*sources.values(), *spec.models()], spec.files())
    evaluations = {}
    for name, source in sources.items():
        fetch_weights(source, source.header_bytes)
        evaluations[name] = evaluate_source(source, spec, on_progress)
    return evaluations


def _open_model(model: str, folder: Path) -> Source:
    return open_source(parse_reference(model, folder), folder)


def evaluate_source(
    source: Source, spec: EvalSpec, on_progress: OnProgress = _silent
) -> Evaluation:
    """Evaluate an opened source whose weights are on disk."""
    fingerprint = source_fingerprint(source)
    device = choose_device(spec.device)
    dtype, dtype_reason = choose_dtype(source, device.kind, spec.dtype)
    settings = {
        "model": fingerprint,
        "device": device.kind,
        "dtype": dtype,
        "seed": spec.seed,
        "max_length": spec.max_length,
        "batch_tokens": spec.batch_tokens,
    }
    live: LiveModel | None = None
    done: dict[str, TaskResult] = {}
    descriptions = (f"{device.name} ({device.reason})", f"{dtype} ({dtype_reason})")
    try:
        for task in spec.tasks:
            cached = spec.cache and task.is_cached
            key = cache.key_of({**settings, **task.identity()}) if cached else ""
            result = cache.find(key, task.name) if cached else None
            if result is None:
                with torch_threads(spec.threads), memory_errors(source.label, _SMALLER):
                    if live is None:
                        live = _loaded(source, spec)
                        refuse_changed(source, fingerprint)
                        check_tasks(spec.tasks, live)
                    result = score_task(task, live, on_progress)
                if cached:
                    cache.keep(key, result)
            done[task.name] = result
        if live is not None:
            descriptions = live.device, live.dtype
    except KeyboardInterrupt:
        hint = "The same command resumes: finished tasks are kept." if spec.cache else ""
        raise Interrupted("stopped", where=source.label, hint=hint) from None
    finally:
        if live is not None:
            live.close()
    return Evaluation(source.label, fingerprint, *descriptions, done)


def spec_of(eval_file: Path | None, data: Sequence[Path]) -> EvalSpec:
    """The tasks of `--eval FILE` and `--data FILE...` together.

    Raises:
        RecipeError: an invalid evaluation file.
        UsageError: neither is given, or a file twice.
    """
    if eval_file is None and not data:
        hint = "Give --data FILE for its loss, or --eval FILE for other tasks (docs/evaluate.md)."
        raise UsageError("nothing to evaluate", hint=hint)
    if eval_file is None:
        return as_spec(data)
    spec = read_eval(eval_file)
    return replace(spec, tasks=_named_apart(spec.tasks, as_spec(data).tasks if data else ()))


def spec_for(recipe: Recipe, eval_file: Path | None, data: Sequence[Path]) -> EvalSpec | None:
    """The tasks of the flags, or else of the recipe's `eval`; None where there are none.

    Raises:
        RecipeError: an invalid `eval` section or evaluation file, with every problem's position.
    """
    if eval_file is not None or data:
        return spec_of(eval_file, data)
    return None if recipe.eval is None else parse_eval(recipe.eval, recipe.file, recipe.folder)


def as_spec(tasks: str | Path | EvalSpec | Sequence[str | Path | Task]) -> EvalSpec:
    """Tasks in any of the forms that `evaluate` takes.

    Raises:
        UsageError: no tasks, or one of them twice.
    """
    if isinstance(tasks, EvalSpec):
        return tasks
    if isinstance(tasks, str | Path):
        path = Path(tasks)
        if path.suffix in (".yaml", ".yml"):
            return read_eval(path)
        return EvalSpec((LossTask(name=default_name(path), data=path),))
    listed = [
        task if isinstance(task, Task) else LossTask(name=default_name(task), data=Path(task))
        for task in tasks
    ]
    if not listed:
        raise UsageError("nothing to evaluate: no task", hint="Name a file of data, for its loss.")
    return EvalSpec(_named_apart((), listed))


def _named_apart(tasks: Sequence[Task], more: Sequence[Task]) -> tuple[Task, ...]:
    """All of them; of the second those whose name stands twice have their file's path as one.

    Raises:
        UsageError: two still have one name.
    """
    names = Counter(task.name for task in (*tasks, *more))
    apart = (*tasks, *(_fully_named(task) if names[task.name] > 1 else task for task in more))
    for name, count in Counter(task.name for task in apart).items():
        if count > 1:
            hint = "Name each file or task once."
            raise UsageError(f"{name} is to be evaluated twice", hint=hint)
    return apart


def _fully_named(task: Task) -> Task:
    """A task with its file's path as name, where short names of several files are the same."""
    data = getattr(task, "data", None)
    return replace(task, name=str(data)) if data is not None else task


def _loaded(source: Source, spec: EvalSpec) -> LiveModel:
    return load(
        source,
        device=spec.device,
        dtype=spec.dtype,
        max_length=spec.max_length,
        batch_tokens=spec.batch_tokens,
        seed=spec.seed,
        memory=spec.memory,
    )


def check_tasks(tasks: Sequence[Task], live: LiveModel) -> None:
    """Check all tasks for tokens that a model lacks, before the first is scored.

    Where all tokens of the tokenizer have embeddings, there is nothing to check.

    Raises:
        SourceError: with file and line.
    """
    numbers = live.tokenizer.get_vocab().values()
    if max(numbers, default=0) >= live.entries:
        for task in tasks:
            task.check(live)


def score_task(task: Task, live: LiveModel, on_progress: OnProgress = _silent) -> TaskResult:
    """Score one task on a loaded model, with its cost.

    Raises:
        NonFiniteError: the model predicts NaN or Inf.
    """
    started, live.cost = time.monotonic(), Cost()

    def count(done: int, total: int) -> None:
        on_progress(Progress(task.name, done, total, unit="", model=live.label))

    count(0, 0)
    result = task.score(live, count)
    for metric in result.metrics.values():
        if not all(map(math.isfinite, metric.parts)):
            message = f"{task.name}.{metric.name} is not a number: the model predicts NaN or Inf"
            raise NonFiniteError(message, model=live.label, hint="Try --dtype float32.")
    cost = replace(live.cost, seconds=round(time.monotonic() - started, 3))
    return replace(result, cost=cost)


def write_examples(evaluations: Iterable[tuple[str, Evaluation]], path: Path) -> None:
    """Every example of every task and model, by the name given for it, as JSON lines.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8") as file:
            for name, evaluation in evaluations:
                for task in evaluation.tasks.values():
                    for example in task.examples:
                        row = {"model": name, "task": task.name, **example}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise write_error(error, path) from error
