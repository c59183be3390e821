"""Extracting a fine-tune's change as a LoRA adapter (`merge-cli extract-lora`).

    base, fine-tune ──▶ plan: pairs of tensors ──▶ change of each ─┬─ linear layer: factors
                                                                  ├─ norm, router: saved in full
                                                                  └─ else: left out, and reported

Matrices are decomposed one after another, so that memory depends on the largest one alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from merge_cli.adapters.fine_tune import FineTune, look_up_modules
from merge_cli.adapters.folder import AdapterFolder, adapter_config, adapter_output, extraction_card
from merge_cli.adapters.pair import ExpertMatrix, plan_pair
from merge_cli.adapters.saved import SavedTensors, save_rest
from merge_cli.adapters.selection import check_filters, select, unused_filters
from merge_cli.adapters.threads import in_threads, threads_for
from merge_cli.checkpoint.tensors import reading
from merge_cli.engine.device import choose_device
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.memory import keep_freed_memory
from merge_cli.engine.merge import fetch_inputs, protected_paths
from merge_cli.engine.pool import memory_errors, one_torch_thread
from merge_cli.errors import UsageError
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.planning.equal_tensors import compare
from merge_cli.planning.plan import TensorTask
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
        UsageError: an invalid rank, energy or filter; OUT exists.
        SourceError, MismatchError: models that cannot be opened, or do not fit one another; a
            fine-tune without a change that an adapter can hold.
        ResourceError: not enough memory or disk; no such device; no torch.
    """
    cut = _cut(rank, energy)
    check_filters(include, exclude)
    plan = plan_pair(str(model), str(base))
    on_progress = on_progress or ignore_progress
    devices = choose_device(device)
    device_name = f"cuda:{devices.indexes[0]}" if devices.indexes else "cpu"
    pair = look_up_modules(plan)
    selection, experts = select(pair, include, exclude, embeddings=embeddings)
    expert_tensors = {name for part in experts for name in part.tensors}
    # A tensor without a base is copied from there: integers, and what the fine-tune lacks.
    jobs: list[TensorTask | ExpertMatrix] = [
        task for task in plan.tasks if task.base and task.name not in expert_tensors
    ]
    jobs += experts
    changes: list[ModuleChange] = []

    def decompose(task: TensorTask | ExpertMatrix) -> Factors | float | None:
        if isinstance(task, ExpertMatrix):
            return factorise(change.expert(task, pair.tasks), cut, device_name)
        if selection.factors(task, pair.parameters.get(task.name)):
            return factorise(change.matrix(task), cut, device_name)
        return change.squares(task)

    fetch_inputs(plan, on_progress)
    filters = unused_filters(include, exclude, pair.tasks)
    notes = [*plan.notes, *filters, *compare(plan.compared)]
    keep_freed_memory()
    shapes = [
        t.shape for n, t in pair.tasks.items() if selection.factors(t, pair.parameters.get(n))
    ]
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
        adapter = AdapterFolder(folder, transposed=pair.transposed)
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
                    parameter = pair.parameters[task.name]
                    adapter.add(parameter.module, outcome, embedding=parameter.kind == "embedding")
                    changes.append(
                        ModuleChange(task.name, outcome.squares, outcome.share, outcome.rank)
                    )
                elif outcome:
                    why = selection.why_left_out(task, pair.parameters.get(task.name))
                    changes.append(ModuleChange(task.name, outcome, float(not why), None, why))
            on_progress(Progress("extract", len(jobs), len(jobs), "", "tensors"))
            saved = save_rest(adapter, changes, pair, selection)
            changes = [change.with_why(saved.unsaved.get(change.name, "")) for change in changes]
            size = adapter.finish(_config(pair, adapter, saved), read)
        finally:
            adapter.close()
        model_bytes = sum(task.operands[0].nbytes for task in plan.tasks)
        notes += [*_rank_notes(cut, shapes), *saved.notes]
        extracted = ExtractedAdapter(Path(out), size, model_bytes, tuple(changes), tuple(notes))
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


def _rank_notes(cut: RankTruncation, shapes: Sequence[Sequence[int]]) -> Iterator[str]:
    """That a rank is larger than any matrix has: then nothing is saved by factors."""
    largest = max((min(shape) for shape in shapes), default=0)
    if cut.rank is not None and largest and cut.rank > largest:
        yield f"no matrix has more than rank {largest}: --rank {cut.rank} cuts nothing off"


def _config(pair: FineTune, adapter: AdapterFolder, saved: SavedTensors) -> dict[str, Any]:
    base = pair.base
    return adapter_config(
        adapter.ranks,
        targets=saved.targets,
        base=base.hub.repo_id if base.hub else str(base.root.resolve()),
        revision=base.revision,
        transposed=pair.transposed,
        saved=saved.modules,
        biases=saved.biases,
        task_type=pair.task_type,
        parameters=adapter.parameters,
        version=NEWEST,
    )
