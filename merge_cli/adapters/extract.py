"""A fine-tune's change as a LoRA adapter: `merge-cli extract-lora`.

    base, fine-tune ──▶ plan: tensors side by side ──▶ change of each ─┬─ linear layer: factors
                                                                      ├─ norm, router: saved whole
                                                                      └─ else: left out, and told

One matrix after another, so that memory depends on the largest one alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.adapters.experts import NEWEST, ExpertStacks
from merge_cli.adapters.factors import Factors, RankTruncation, factorise, in_threads, threads_for
from merge_cli.adapters.folder import AdapterFolder, adapter_config, adapter_output, extraction_card
from merge_cli.adapters.pair import AdapterPart, ModuleMap, ModuleParameter, plan_pair
from merge_cli.checkpoint.tensors import Read, read_numbers, reading
from merge_cli.engine.device import choose_device
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.merge import fetch_inputs, protected_paths
from merge_cli.engine.pool import memory_errors, one_torch_thread
from merge_cli.errors import UsageError
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.recipe.values import matches

RANK = 32  # where neither rank nor energy is given
_BLOCK = 2**22


@dataclass(frozen=True)
class ModuleChange:
    """What became of one tensor's change.

    Attributes:
        squares: the sum of squares of the change.
        share: of it, what the adapter holds.
        rank: of its factors; None where it is saved whole (1.0) or left out (0.0).
        why: a reason for being left out.
    """

    name: str
    squares: float
    share: float
    rank: int | None = None
    why: str = ""


@dataclass(frozen=True)
class ExtractedAdapter:
    """A finished adapter.

    Attributes:
        bytes: of its weights; `model_bytes` are those of the fine-tune.
        changes: of every tensor that has changed.
    """

    path: Path
    bytes: int
    model_bytes: int
    changes: tuple[ModuleChange, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the whole change's sum of squares, what the adapter holds."""
        total = sum(change.squares for change in self.changes)
        held = sum(change.share * change.squares for change in self.changes)
        return held / total if total else 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "model_bytes": self.model_bytes,
            "share": self.share,
            "notes": list(self.notes),
            "changes": [
                {
                    "name": c.name,
                    "squares": c.squares,
                    "share": c.share,
                    "rank": c.rank,
                    **({"why": c.why} if c.why else {}),
                }
                for c in self.changes
            ],
        }


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
    show: OnProgress | None = None,
) -> ExtractedAdapter:
    """Write what a fine-tune has changed as an adapter that PEFT loads onto its base.

    Args:
        model, base: folders or Hub ids of equal architecture and vocabulary.
        rank: of every matrix at most; without it and `energy`, 32.
        energy: the share of a matrix's sum of squares to hold, 0 to 1.
        embeddings: they get factors, too. Where the head is tied to them, the adapter means both
            only when it is merged into the model.
        include: filters on tensor names, as in recipes: layers that get factors; default all.
        exclude: filters on what stays out, whatever it is.
        overwrite: replace OUT, if it is a model.
        fresh: throw away what other work has left beside OUT.
        on_progress: told of progress; `show` is its old name.

    Raises:
        UsageError: a rank or an energy that is none, OUT exists.
        SourceError, MismatchError: models that cannot be opened, or do not fit one another.
        ResourceError: no room, no such device.
    """
    cut = _cut(rank, energy)
    plan = plan_pair(str(model), str(base))
    on_progress = on_progress or show or ignore_progress
    fetch_inputs(plan, on_progress)
    chosen = choose_device(device)
    place = f"cuda:{chosen.indexes[0]}" if chosen.indexes else "cpu"
    skeleton = ModuleMap(plan.sources[plan.base or 0])
    seats = skeleton.seats({task.name: task.shape for task in plan.tasks})
    turned = any(seat.kind == "conv1d" for seat in seats.values())
    choice = _Selection(tuple(include), tuple(exclude), turned, embeddings)
    tasks = {task.name: task for task in plan.tasks}
    parts = _experts(skeleton, tasks, choice)
    inside = {name for part in parts for name in part.tensors}
    choice = replace(choice, stacks=frozenset(part.place.module for part in parts))
    jobs: list[TensorTask | AdapterPart] = [t for t in plan.tasks if t.name not in inside]
    jobs += parts
    changes: list[ModuleChange] = []
    whole: list[TensorTask] = []

    def look(task: TensorTask | AdapterPart) -> Factors | float | None:
        if isinstance(task, AdapterPart):
            return factorise(_change_of_expert(task, tasks, read), cut, place)
        if choice.factors(task, seats.get(task.name)):
            return factorise(_change(task, read), cut, place)
        return _squares(task, read)

    shapes = [task.shape for task in plan.tasks if len(task.shape) == 2]
    count = threads_for([*shapes, *(part.place.shape for part in parts)])
    with (
        adapter_output(
            Path(out),
            overwrite=overwrite,
            precious=protected_paths(plan),
            inputs=inputs_of(plan),
            fresh=fresh,
        ) as folder,
        one_torch_thread(chosen, "torch"),
        memory_errors(resumes=False),
        reading() as read,
        in_threads(look, jobs, 1 if chosen.indexes else count) as looked_at,
    ):
        adapter = AdapterFolder(folder, turned=turned)
        stacks = ExpertStacks(adapter, {part.name: part.place for part in parts})
        try:
            for done, (task, found) in enumerate(looked_at):
                on_progress(Progress("extract", done, len(jobs), task.name, "tensors"))
                if isinstance(task, AdapterPart):
                    assert found is None or isinstance(found, Factors)
                    stacks.add(task.name, found)
                    if found:
                        about = (found.squares, found.share, found.rank)
                        changes.append(ModuleChange(task.name, *about))
                elif isinstance(found, Factors):
                    seat = seats[task.name]
                    adapter.add(seat.module, found, embedding=seat.kind == "embedding")
                    changes.append(ModuleChange(task.name, found.squares, found.share, found.rank))
                elif found:
                    why = choice.refuses(task, seats.get(task.name))
                    whole += [] if why else [task]
                    changes.append(ModuleChange(task.name, found, float(not why), None, why))
            on_progress(Progress("extract", len(jobs), len(jobs), "", "tensors"))
            _keep_whole(adapter, plan, seats, whole)
            size = adapter.finish(_config(plan, adapter, seats, whole, skeleton, turned), read)
        finally:
            adapter.close()
        model_bytes = sum(task.operands[0].nbytes for task in plan.tasks)
        result = ExtractedAdapter(Path(out), size, model_bytes, tuple(changes), plan.notes)
        (folder / "README.md").write_text(extraction_card(plan, result, cut), encoding="utf-8")
    return result


def _cut(rank: int | None, energy: float | None) -> RankTruncation:
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} is none", hint="Give at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"an energy of {energy} is none", hint="Give a share from above 0 to 1.")
    return RankTruncation(RANK if rank is None and energy is None else rank, energy)


@dataclass(frozen=True)
class _Selection:
    """What becomes factors, what is saved whole, what is left out."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    turned: bool
    embeddings: bool
    stacks: frozenset[str] = frozenset()  # modules whose experts get factors

    def refuses(self, task: TensorTask, seat: ModuleParameter | None) -> str:
        """Why a tensor's change cannot be in an adapter, or shall not; empty when it is."""
        if any(matches(pattern, task.name) for pattern in self.exclude):
            return "excluded"
        if seat is None:
            return "transformers holds it in another form"
        if seat.module in self.stacks:
            return "beside its experts' factors, where PEFT keeps nothing else"
        if seat.kind == "embedding":
            return "" if self.embeddings else "an embedding: --embeddings gives it factors"
        if seat.kind == "inner":
            return "a parameter of no layer"
        linear = seat.kind in ("linear", "conv1d")
        if linear and seat.parameter == "weight":
            if self.turned and seat.kind == "linear":
                return "stored [out, in], in a model whose layers are stored [in, out]"
            if self.include and not any(matches(p, task.name) for p in self.include):
                return "not included"
        return ""

    def takes(self, names: Sequence[str]) -> bool:
        """Whether a matrix that these tensors make gets factors."""
        if any(matches(pattern, name) for pattern in self.exclude for name in names):
            return False
        requested = (matches(pattern, name) for pattern in self.include for name in names)
        return not self.include or any(requested)

    def factors(self, task: TensorTask, seat: ModuleParameter | None) -> bool:
        """Whether its change becomes factors."""
        if seat is None or self.refuses(task, seat):
            return False
        layer = seat.kind in ("linear", "conv1d", "embedding") and seat.parameter == "weight"
        return layer and len(task.shape) == 2


def _experts(
    skeleton: ModuleMap, tasks: Mapping[str, TensorTask], choice: _Selection
) -> list[AdapterPart]:
    """Matrices of experts that get factors: all of a parameter's, or none."""
    result = skeleton.experts({name: task.shape for name, task in tasks.items()})
    kept = [
        parts
        for parts in result.values()
        if not choice.turned and all(choice.takes(part.tensors) for part in parts)
    ]
    return [part for parts in kept for part in parts]


def _change_of_expert(part: AdapterPart, tasks: Mapping[str, TensorTask], read: Read) -> Any:
    """Fine-tune minus base, numpy float32 [outputs, inputs]."""
    import numpy as np

    changes = []
    for name in part.tensors:
        task = tasks[name]
        assert task.base is not None
        height, width = task.shape[-2:]
        start = (part.index or 0) * height * width
        numbers = read_numbers(read, task.operands[0], start, height * width)
        numbers -= read_numbers(read, task.base, start, height * width)
        changes.append(numbers.reshape(height, width))
    whole = np.concatenate(changes)
    return np.ascontiguousarray(whole.T) if part.turned else whole


def _change(task: TensorTask, read: Read) -> Any:
    """Fine-tune minus base, numpy float32 in the tensor's shape."""
    assert task.base is not None
    change = read_numbers(read, task.operands[0], 0, task.size)
    for start, count in _spans(task.size):
        change[start : start + count] -= read_numbers(read, task.base, start, count)
    return change.reshape(task.shape)


def _squares(task: TensorTask, read: Read) -> float:
    """The sum of squares of the change, without making it."""
    import numpy as np

    assert task.base is not None
    total = 0.0
    for start, count in _spans(task.size):
        part = read_numbers(read, task.operands[0], start, count)
        part -= read_numbers(read, task.base, start, count)
        total += float(np.square(part, dtype=np.float64).sum())
    return total


def _spans(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_BLOCK, size - start)) for start in range(0, size, _BLOCK))


def _keep_whole(
    adapter: AdapterFolder,
    plan: Plan,
    seats: dict[str, ModuleParameter],
    changed: Sequence[TensorTask],
) -> None:
    """Biases by themselves; of other modules everything, as PEFT keeps a copy of the module."""
    modules = {seats[task.name].module for task in changed if not _is_bias(seats[task.name])}
    names = {task.name for task in changed}
    for task in plan.tasks:
        seat = seats.get(task.name)
        if seat and (task.name in names or (seat.module in modules and not _is_bias(seat))):
            adapter.keep(f"{seat.module}.{seat.parameter}", task.operands[0])


def _is_bias(seat: ModuleParameter) -> bool:
    """PEFT counts biases of linear layers as their own."""
    return seat.parameter == "bias" and seat.kind in ("linear", "conv1d")


def _config(
    plan: Plan,
    adapter: AdapterFolder,
    seats: dict[str, ModuleParameter],
    whole: Sequence[TensorTask],
    skeleton: ModuleMap,
    turned: bool,
) -> dict[str, Any]:
    base = plan.sources[plan.base or 0]
    modules = dict.fromkeys(
        seats[task.name].module for task in whole if not _is_bias(seats[task.name])
    )
    return adapter_config(
        adapter.ranks,
        base=base.hub.repo_id if base.hub else str(base.root.resolve()),
        revision=base.revision,
        turned=turned,
        whole=list(modules),
        biases=any(_is_bias(seats[task.name]) for task in whole),
        task_type=skeleton.task_type,
        parameters=adapter.parameters,
        version=NEWEST,
    )
