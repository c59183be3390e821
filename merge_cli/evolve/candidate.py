"""One live model that becomes the merge of any recipe of the same sources, in place.

Every weight comes from the engine's own `Computer`, over the engine's own lanes: only where it
reads from and writes to is different. What has not changed since the last candidate is left as it
is, and what a method had to know of a whole tensor (thresholds, norms) is remembered for the same
parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from merge_cli.engine.device import choose_device
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.plan import TensorTask
from merge_cli.engine.planner import make_plan
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.seats import find_parameter_slices
from merge_cli.evolve.merger import InMemoryMerger
from merge_cli.evolve.resident import (
    InMemoryFiles,
    SourcesInMemory,
    choose_residency,
)
from merge_cli.evolve.shell import load_scaffold
from merge_cli.recipe.schema import Recipe

# Methods, or sets of sources (a greedy soup tries one after another), whose threads are kept.
_ENGINES = 4
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class MergeableModel:
    """A loaded model, its sources, and what turns a recipe into its weights.

    Args:
        recipe: one static recipe of the sources; others may differ in method, in parameters, and
            in which of the sources they list.
        loading: of the live model: device, dtype, max_length, batch_tokens, seed, memory.

    Attributes:
        live: the model, holding the merge of the last recipe.
        rewritten, skipped: tensors that candidates have changed, and that they left as they were.
    """

    def __init__(
        self, recipe: Recipe, options: MergeOptions, *, workers: int = 1, **loading: Any
    ) -> None:
        plan = make_plan(recipe)
        self._options, self._device = options, choose_device(options.device)
        refs = list(plan.stored_inputs)
        self.place: SourcesInMemory = choose_residency(
            refs, self._device, workers, plan.bytes_written
        )
        where = f"cuda:{self._device.indexes[0]}" if self._device.indexes else "cpu"
        self._files = InMemoryFiles(self.place, where)
        self._files.keep(refs)
        self.live: LiveModel = load_scaffold(plan, options, **loading)
        self._seats = find_parameter_slices(plan, self.live.net)
        self._mergers: OrderedDict[tuple[Any, ...], InMemoryMerger] = OrderedDict()
        self._held: dict[str, str] = {}  # tensor -> what it holds the merge of
        self.rewritten = self.skipped = 0

    def become(self, recipe: Recipe) -> None:
        """Rewrite the live model's parameters: the weights that merging the recipe would write.

        Raises:
            RecipeError: parameters that no tensor can be merged with.
            NonFiniteError: as for a merge.
            ResourceError: memory ran out.
        """
        key = (recipe.merge_method, *(spec.model for spec in recipe.models))
        if key not in self._mergers:
            plan = make_plan(recipe)
            self._files.keep(plan.stored_inputs)
            self._mergers[key] = InMemoryMerger(
                plan, self._files, self._device, self._options, self.place.residency
            )
            if len(self._mergers) > _ENGINES:
                self._mergers.popitem(last=False)[1].close()
        self._mergers.move_to_end(key)
        merger = self._mergers[key]
        tasks = merger.resolved(recipe)
        wanted = {
            task.name: f"{key} {task.action} {sorted(task.parameters.items())}"
            for task in tasks
            if task.name in self._seats
        }
        changed = [
            number
            for number, task in enumerate(tasks)
            if task.name in self._seats
            and (merger.surveys or self._held.get(task.name) != wanted[task.name])
        ]
        for number in changed:
            self._held.pop(tasks[number].name, None)  # half-way it holds neither
        merger.merge(tasks, changed, self._take)
        for number in changed:
            self._held[tasks[number].name] = wanted[tasks[number].name]
        self.rewritten += len(changed)
        self.skipped += len(wanted) - len(changed)

    def close(self) -> None:
        """Let go of the model, the sources and the threads."""
        for merger in self._mergers.values():
            merger.close()
        self.live.close()
        self._files.close()

    def _take(self, task: TensorTask, raw: Any) -> None:
        """A merged tensor's bytes into the parameter; by the pool's threads."""
        import torch

        held = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(raw)
        stored = held.view(getattr(torch, _TORCH[task.dtype]))
        with torch.no_grad():
            self._seats[task.name].values.copy_(stored.reshape(task.shape))
