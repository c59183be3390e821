"""Merging adapters with one another into an adapter (`output: adapter`).

    B_1 A_1, B_2 A_2, ...  ─┬─ a weighted sum: [c_1 B_1, c_2 B_2, ...] [A_1; A_2; ...], in factors
                            └─ any other method: one merged matrix at a time, then truncated

Their base model is never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.adapters.experts import ExpertStacks
from merge_cli.adapters.factors import (
    Factors,
    RankTruncation,
    factorise,
    needs_torch,
    recombine,
    zeros,
)
from merge_cli.adapters.folder import AdapterFolder, adapter_config, adapter_output, merge_card
from merge_cli.adapters.kept_changes import ChangeCache
from merge_cli.adapters.threads import threads_for
from merge_cli.checkpoint.non_finite import non_finite_error
from merge_cli.checkpoint.tensors import Read, reading
from merge_cli.engine.device import choose_device
from merge_cli.engine.in_memory import InMemoryFiles, InMemoryMerger
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.merge import fetch_inputs, protected_paths, verified_fingerprints
from merge_cli.engine.operands import operands_of
from merge_cli.engine.pool import one_torch_thread
from merge_cli.engine.residency import SourceResidency
from merge_cli.lora.adapter import Adapter
from merge_cli.lora.changes import LowRank, embeddings_of, experts_of
from merge_cli.methods.blocks import Block, Span
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.adapters import LINEAR, ZERO_BASE, base_name, rank_of
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.resolve import arguments
from merge_cli.report.write import resolved_recipe
from merge_cli.system.libraries import require
from merge_cli.system.machine import free_memory

_KEPT_SHARE = 0.25  # of the free memory: for changes that a method reads several times


def merge_adapters(
    plan: Plan, out: Path, options: MergeOptions, *, on_progress: OnProgress
) -> dict[str, Any]:
    """Merge the adapters, truncate the changes, write OUT.

    Args:
        plan: by `planning.adapters.plan_adapters`.

    Returns:
        the report, which is also OUT/merge_report.json.

    Raises:
        UsageError: OUT exists, or holds a source.
        SourceError, NonFiniteError: an adapter that cannot be read, or has NaN.
        ResourceError: not enough memory or disk; no such device; no torch.
    """
    fetch_inputs(plan, on_progress)
    fingerprints = verified_fingerprints(plan)
    output = plan.recipe.output
    cut = RankTruncation(rank_of(plan), output.energy if output else None)
    adapters = [source.adapter for source in plan.sources if source.adapter is not None]
    transposed = bool(adapters[0].config.get("fan_in_fan_out"))
    embedding_names = {name for adapter in adapters for name in embeddings_of(adapter)}
    makers = _sums if plan.method.name in LINEAR else _matrices
    with (
        adapter_output(
            out,
            overwrite=options.overwrite,
            protected=protected_paths(plan),
            inputs=inputs_of(plan),
            fresh=options.fresh,
        ) as folder,
        reading() as read,
    ):
        writer = AdapterFolder(folder, transposed=transposed)
        positions = {
            name: position for item in adapters for name, position in experts_of(item).items()
        }
        stacks = ExpertStacks(writer, positions)
        merged: dict[str, Factors] = {}
        try:
            for done, (task, factors) in enumerate(makers(plan, options, cut, read)):
                on_progress(Progress("merge", done, len(plan.tasks), task.name, "modules"))
                if task.name in positions:
                    stacks.add(task.name, factors)
                elif factors is not None:
                    module = task.name.removesuffix(".weight")
                    writer.add(module, factors, embedding=task.name in embedding_names)
                if factors is not None:
                    merged[task.name] = factors
            if not writer.ranks and not writer.parameters:  # PEFT loads no adapter without factors
                task = min(plan.tasks, key=lambda task: task.size)
                embedding = task.name in embedding_names
                writer.add(
                    task.name.removesuffix(".weight"), zeros(task.shape), embedding=embedding
                )
            size = writer.finish(_config(plan, writer, adapters, transposed), read)
        finally:
            writer.close()
        text, _ = resolved_recipe(_as_written(plan), fingerprints, out.absolute())
        report = _report(plan, fingerprints, merged, size, text)
        files = {
            "merge_recipe.yaml": text,
            "merge_report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        }
        if options.model_card:
            files["README.md"] = merge_card(plan, base_name(adapters), out.name, report)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    return report


def _sums(
    plan: Plan, options: MergeOptions, cut: RankTruncation, read: Read
) -> Iterator[tuple[TensorTask, Factors | None]]:
    """Weighted sums, computed in factors."""
    import numpy as np

    for task in plan.tasks:
        lefts, rights = [], []
        for change, coefficient in zip(task.operands, _coefficients(plan, task), strict=True):
            if isinstance(change, LowRank) and coefficient:
                left, right = change.factors(read)
                if not (np.isfinite(left).all() and np.isfinite(right).all()):
                    hint = "Replace the file, or leave the adapter out."
                    raise non_finite_error(change, None, hint=hint, together=hint)
                lefts.append(left.astype(np.float64) * (change.scale * coefficient))
                rights.append(right.astype(np.float64))
        if not lefts:
            yield task, None
        else:
            yield task, recombine(np.concatenate(lefts, 1), np.concatenate(rights), cut)


def _coefficients(plan: Plan, task: TensorTask) -> list[float]:
    """The factor of each operand in a linear method: what it makes of unit vectors."""
    import numpy as np

    count = len(task.operands)
    rows = list(np.eye(count, dtype=np.float32))
    block = Block(np.zeros(count, np.float32), rows, Span(task.name, 0, plan.recipe.seed, task.ids))
    method = plan.method
    coefficients = method.function(
        **operands_of(block, method.supplied), **arguments(method, task.parameters)
    )
    return [float(value) for value in coefficients]


def _matrices(
    plan: Plan, options: MergeOptions, cut: RankTruncation, read: Read
) -> Iterator[tuple[TensorTask, Factors | None]]:
    """Changes merged by the engine, one matrix of each thread at a time."""
    import numpy as np

    device = choose_device(options.device)
    device_name = f"cuda:{device.indexes[0]}" if device.indexes else "cpu"
    files = InMemoryFiles(SourceResidency("disk", "adapters are small", 0), device_name)
    factors: dict[str, Factors | None] = {}

    def take(task: TensorTask, raw: Any) -> None:
        matrix = np.asarray(raw).view(np.float32).reshape(task.shape)
        factors[task.name] = factorise(matrix, cut, device_name)
        cache.drop(task)

    shapes = [task.shape for task in plan.tasks]
    arithmetic = "torch" if needs_torch(shapes, cut, device_name) else "compiled"
    if arithmetic == "torch":
        require("torch", "merging adapters")
    cache = ChangeCache(int(free_memory() * _KEPT_SHARE))
    tasks = cache.wrapped(plan.tasks)
    count = threads_for(shapes, options.threads, kept=max(len(task.operands) for task in tasks))
    options = replace(options, threads=count)
    merger = InMemoryMerger(replace(plan, tasks=tasks), files, device, options, "disk")
    try:
        with one_torch_thread(device, arithmetic):
            merger.merge(tasks, range(len(tasks)), take)
    finally:
        merger.close()
        files.close()
    for task in plan.tasks:
        yield task, factors.get(task.name)


def _config(
    plan: Plan, writer: AdapterFolder, adapters: list[Adapter], transposed: bool
) -> dict[str, Any]:
    kinds = {adapter.config.get("task_type") for adapter in adapters}
    base = _as_written(plan).recipe.base_model
    revisions = {adapter.config.get("revision") for adapter in adapters}
    return adapter_config(
        writer.ranks,
        base=str(base) if base is not None else base_name(adapters),
        revision=revisions.pop() if len(revisions) == 1 and base is None else None,
        transposed=transposed,
        task_type=kinds.pop() if len(kinds) == 1 else None,
        parameters=writer.parameters,
        version=next((str(v) for item in adapters if (v := item.config.get("peft_version"))), None),
    )


def _as_written(plan: Plan) -> Plan:
    """The plan with the base that the recipe names, if it names one."""
    if plan.recipe.base_model != ZERO_BASE:
        return plan
    return replace(plan, recipe=replace(plan.recipe, base_model=None))


def _report(
    plan: Plan, fingerprints: tuple[str, ...], merged: dict[str, Factors], size: int, text: str
) -> dict[str, Any]:
    squares = sum(factors.squares for factors in merged.values())
    held = sum(factors.share * factors.squares for factors in merged.values())
    return {
        "merge_cli": version("merge-cli"),
        "recipe": {"method": plan.recipe.merge_method, "text": text},
        "inputs": [
            {
                "model": source.label,
                "fingerprint": fingerprint,
                "revision": source.adapter.hub.commit if source.adapter.hub else None,
            }
            for source, fingerprint in zip(plan.sources, fingerprints, strict=True)
            if source.adapter
        ],
        "notes": list(plan.notes),
        "adapter": {
            "bytes": size,
            "share": held / squares if squares else 1.0,
            "modules": {
                name: {"rank": factors.rank, "share": factors.share}
                for name, factors in merged.items()
            },
            "unchanged": [task.name for task in plan.tasks if task.name not in merged],
        },
    }
