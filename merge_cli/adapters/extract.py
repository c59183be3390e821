"""Extracting a fine-tune's change as a LoRA adapter (`merge-cli extract-lora`).

    base, fine-tune ──▶ plan: pairs of tensors ──▶ change of each ─┬─ linear layer: factors
                                                                  ├─ norm, router: saved in full
                                                                  └─ else: left out, and reported

Matrices are decomposed one after another, so that memory depends on the largest one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.adapters.differences import ChangeReader
from merge_cli.adapters.experts import NEWEST, ExpertStacks
from merge_cli.adapters.extracted import ExtractedAdapter, ModuleChange
from merge_cli.adapters.factors import (
    Factors,
    RankTruncation,
    factorise,
    needs_torch,
)
from merge_cli.adapters.folder import AdapterFolder, adapter_config, adapter_output, extraction_card
from merge_cli.adapters.known_modules import KnownModules, known_modules
from merge_cli.adapters.pair import ExpertMatrix, ModuleMap, ModuleParameter, plan_pair
from merge_cli.adapters.selection import Selection, selected_experts
from merge_cli.adapters.threads import in_threads, threads_for
from merge_cli.checkpoint.tensors import reading
from merge_cli.engine.device import choose_device
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.memory import keep_freed_memory
from merge_cli.engine.merge import fetch_inputs, protected_paths
from merge_cli.engine.pool import memory_errors, one_torch_thread
from merge_cli.errors import UsageError
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.system.libraries import require

RANK = 32  # where neither rank nor energy is given


def extract_lora(
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    on_progress: OnProgress | None = None,
) -> ExtractedAdapter:
    """Extract a fine-tune's change of its base as an adapter that PEFT loads.

    Args:
        model, base: folders or Hub ids of equal architecture and vocabulary.
        rank: the highest rank of any matrix; 32 if neither `rank` nor `energy` is given.
        energy: the share of each matrix's sum of squares to hold, 0 to 1.
        embeddings: give factors to embeddings, too. With a tied head, the adapter changes the head
            only when it is merged into the model.
        include: filters on tensor names, as in recipes: layers that get factors; default all.
        exclude: filters on tensor names: what is left out of the adapter.
        overwrite: replace OUT, if it is a model.
        fresh: discard the working files of another command for OUT.
        on_progress: called with progress.

    Raises:
        UsageError: an invalid rank or energy; OUT exists.
        SourceError, MismatchError: models that cannot be opened, or do not fit one another.
        ResourceError: not enough memory or disk; no such device; no torch.
    """
    cut = _cut(rank, energy)
    plan = plan_pair(str(model), str(base))
    on_progress = on_progress or ignore_progress
    fetch_inputs(plan, on_progress)
    devices = choose_device(device)
    device_name = f"cuda:{devices.indexes[0]}" if devices.indexes else "cpu"
    source, stored = plan.sources[plan.base or 0], {task.name: task.shape for task in plan.tasks}
    modules = known_modules(source.config, stored) or ModuleMap(source)
    parameters = modules.parameters(stored)
    transposed = any(parameter.kind == "conv1d" for parameter in parameters.values())
    selection = Selection(tuple(include), tuple(exclude), transposed, embeddings)
    tasks = {task.name: task for task in plan.tasks}
    experts = selected_experts(modules, tasks, selection)
    expert_tensors = {name for part in experts for name in part.tensors}
    selection = replace(selection, stacks=frozenset(part.position.module for part in experts))
    jobs: list[TensorTask | ExpertMatrix] = [t for t in plan.tasks if t.name not in expert_tensors]
    jobs += experts
    changes: list[ModuleChange] = []
    saved: list[TensorTask] = []

    def decompose(task: TensorTask | ExpertMatrix) -> Factors | float | None:
        if isinstance(task, ExpertMatrix):
            return factorise(change.expert(task, tasks), cut, device_name)
        if selection.factors(task, parameters.get(task.name)):
            return factorise(change.matrix(task), cut, device_name)
        return change.squares(task)

    keep_freed_memory()
    shapes = [t.shape for t in plan.tasks if selection.factors(t, parameters.get(t.name))]
    shapes += [part.position.shape for part in experts]
    arithmetic = "torch" if needs_torch(shapes, cut, device_name) else "compiled"
    if arithmetic == "torch":
        require("torch", "extracting an adapter")
    count = threads_for(shapes)
    with (
        adapter_output(
            Path(out),
            overwrite=overwrite,
            protected=protected_paths(plan),
            inputs=inputs_of(plan),
            fresh=fresh,
        ) as folder,
        one_torch_thread(devices, arithmetic),
        memory_errors(resumes=False),
        reading() as read,
        in_threads(decompose, jobs, 1 if devices.indexes else count) as outcomes,
    ):
        change = ChangeReader(read)
        adapter = AdapterFolder(folder, transposed=transposed)
        stacks = ExpertStacks(adapter, {part.name: part.position for part in experts})
        try:
            for done, (task, outcome) in enumerate(outcomes):
                on_progress(Progress("extract", done, len(jobs), task.name, "tensors"))
                if isinstance(task, ExpertMatrix):
                    assert outcome is None or isinstance(outcome, Factors)
                    stacks.add(task.name, outcome)
                    if outcome:
                        numbers = (outcome.squares, outcome.share, outcome.rank)
                        changes.append(ModuleChange(task.name, *numbers))
                elif isinstance(outcome, Factors):
                    parameter = parameters[task.name]
                    adapter.add(parameter.module, outcome, embedding=parameter.kind == "embedding")
                    changes.append(
                        ModuleChange(task.name, outcome.squares, outcome.share, outcome.rank)
                    )
                elif outcome:
                    why = selection.why_left_out(task, parameters.get(task.name))
                    saved += [] if why else [task]
                    changes.append(ModuleChange(task.name, outcome, float(not why), None, why))
            on_progress(Progress("extract", len(jobs), len(jobs), "", "tensors"))
            _keep_whole(adapter, plan, parameters, saved)
            size = adapter.finish(
                _config(plan, adapter, parameters, saved, modules, transposed), read
            )
        finally:
            adapter.close()
        model_bytes = sum(task.operands[0].nbytes for task in plan.tasks)
        extracted = ExtractedAdapter(Path(out), size, model_bytes, tuple(changes), plan.notes)
        (folder / "README.md").write_text(extraction_card(plan, extracted, cut), encoding="utf-8")
    return extracted


def _cut(rank: int | None, energy: float | None) -> RankTruncation:
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} is not possible", hint="Give at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(
            f"an energy of {energy} is not possible", hint="Give a share above 0 and up to 1."
        )
    return RankTruncation(RANK if rank is None and energy is None else rank, energy)


def _keep_whole(
    adapter: AdapterFolder,
    plan: Plan,
    parameters: dict[str, ModuleParameter],
    saved: Sequence[TensorTask],
) -> None:
    """Save biases alone, and other modules completely: PEFT keeps a copy of the module."""
    modules = {
        parameters[task.name].module for task in saved if not _is_bias(parameters[task.name])
    }
    names = {task.name for task in saved}
    for task in plan.tasks:
        parameter = parameters.get(task.name)
        if parameter and (
            task.name in names or (parameter.module in modules and not _is_bias(parameter))
        ):
            adapter.keep(f"{parameter.module}.{parameter.name}", task.operands[0])


def _is_bias(parameter: ModuleParameter) -> bool:
    """Whether it is a linear layer's bias, which PEFT trains without the layer."""
    return parameter.name == "bias" and parameter.kind in ("linear", "conv1d")


def _config(
    plan: Plan,
    adapter: AdapterFolder,
    parameters: dict[str, ModuleParameter],
    saved: Sequence[TensorTask],
    skeleton: ModuleMap | KnownModules,
    transposed: bool,
) -> dict[str, Any]:
    base = plan.sources[plan.base or 0]
    modules = dict.fromkeys(
        parameters[task.name].module for task in saved if not _is_bias(parameters[task.name])
    )
    return adapter_config(
        adapter.ranks,
        base=base.hub.repo_id if base.hub else str(base.root.resolve()),
        revision=base.revision,
        transposed=transposed,
        saved=list(modules),
        biases=any(_is_bias(parameters[task.name]) for task in saved),
        task_type=skeleton.task_type,
        parameters=adapter.parameters,
        version=NEWEST,
    )
