"""One loaded model that becomes any merge of the sources.

The model is loaded by the same code as a merged model on disk, from a folder of links with the
output's config and tokenizer, so that both behave the same, generation settings included.

Merges run in the engine, from memory to memory. Tensors that have not changed since the last
candidate stay, and what a method has measured of a complete tensor (thresholds, norms) is kept for
the same parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.checkpoint.dtypes import torch_dtype
from merge_cli.engine.device import choose_device
from merge_cli.engine.in_memory import (
    InMemoryFiles,
    InMemoryMerger,
)
from merge_cli.engine.parameter_slices import find_parameter_slices
from merge_cli.engine.residency import SourceResidency, choose_residency, stored_bytes
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.options import MergeOptions
from merge_cli.planning.auxiliary import write_auxiliary_files
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.planner import make_plan
from merge_cli.planning.tasks import TaskResolver
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.opening import open_source
from merge_cli.sources.storage import INDEX

# Mergers that are kept with their threads: one for each method and set of sources.
_MERGERS = 4


def load_scaffold(plan: Plan, options: MergeOptions, **loading: Any) -> LiveModel:
    """A model with the plan's config and tokenizer, and weights that will be replaced.

    Args:
        loading: as for `evaluation.live.load`.

    Raises:
        SourceError: transformers cannot load it.
        ResourceError: there is no such device, or the model does not fit into its memory.
    """
    config_source = plan.sources[plan.config_index]
    with TemporaryDirectory(prefix="merge-cli-live-") as name:
        folder = Path(name)
        write_auxiliary_files(
            plan, folder, tokenizer=options.copy_tokenizer, code=options.trust_remote_code
        )
        if not plan.config:
            (folder / "config.json").symlink_to((config_source.root / "config.json").resolve())
        (folder / INDEX).unlink(missing_ok=True)
        for file in config_source.root.iterdir():
            if file.suffix == ".safetensors" or file.name == INDEX:
                (folder / file.name).symlink_to(file.resolve())
        live = load(open_source(ModelRef(str(folder)), folder), incomplete=True, **loading)
    live.label = "candidate"
    return live


class MergeableModel:
    """A loaded model whose weights become those of any merge of the sources.

    Args:
        recipe: one static recipe of the sources; others may differ in method, in parameters, and
            in which of the sources they list.
        shared: another one, whose bytes of the sources are used; it is closed later.
        plan: the recipe's, where it is made already.
        loading: of the model: device, dtype, max_length, batch_tokens, seed, memory.

    Attributes:
        live: the model, with the weights of the last recipe's merge.
        rewritten, skipped: how many tensors candidates have changed, and left unchanged.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: MergeOptions,
        *,
        workers: int = 1,
        shared: MergeableModel | None = None,
        plan: Plan | None = None,
        **loading: Any,
    ) -> None:
        plan = plan or make_plan(recipe)
        self._options, self._device = options, choose_device(options.device)
        refs = list(plan.stored_inputs)
        index = self._device.indexes[0] if self._device.indexes else None
        self.residency: SourceResidency = choose_residency(
            stored_bytes(refs), index, on_device=plan.bytes_written, workers=workers
        )
        where = "cpu" if index is None else f"cuda:{index}"
        self._shared = shared
        if shared is not None:
            self.residency = shared.residency
        self._files: InMemoryFiles = (
            shared._files if shared is not None else InMemoryFiles(self.residency, where)
        )
        self._files.keep(refs)
        self.live: LiveModel = load_scaffold(plan, options, **loading)
        self._parameters = find_parameter_slices(plan, self.live.net)
        self._mergers: OrderedDict[tuple[Any, ...], tuple[TaskResolver, InMemoryMerger]] = (
            OrderedDict()
        )
        self._merged_with: dict[str, str] = {}  # tensor -> key of the merge whose weights it has
        self.rewritten = self.skipped = 0

    def become(self, recipe: Recipe, plan: Plan | None = None) -> None:
        """Change the model's parameters to the weights that merging the recipe would write.

        Args:
            plan: the recipe's, where more than headers went into it: statistics of examples.

        Raises:
            RecipeError: parameters that the method does not allow.
            NonFiniteError: as for a merge.
            ResourceError: memory ran out.
        """
        models = tuple((spec.model, spec.layer_range) for spec in recipe.source_specs)
        key = (recipe.merge_method, recipe.coefficients, *models)
        if key not in self._mergers:
            plan = plan or make_plan(recipe)
            self._files.keep(plan.stored_inputs)
            self._mergers[key] = (
                TaskResolver(plan),
                InMemoryMerger(
                    plan, self._files, self._device, self._options, self.residency.residency
                ),
            )
            if len(self._mergers) > _MERGERS:
                self._mergers.popitem(last=False)[1][1].close()
        self._mergers.move_to_end(key)
        resolver, merger = self._mergers[key]
        tasks = resolver.tasks(recipe)
        keys = {
            task.name: f"{key} {task.action} {sorted(task.parameters.items())}"
            for task in tasks
            if task.name in self._parameters
        }
        changed = [
            number
            for number, task in enumerate(tasks)
            if task.name in self._parameters
            and (merger.has_model_pass or self._merged_with.get(task.name) != keys[task.name])
        ]
        for number in changed:
            self._merged_with.pop(
                tasks[number].name, None
            )  # neither the old nor the new merge until it is complete
        merger.merge(tasks, changed, self._take)
        for number in changed:
            self._merged_with[tasks[number].name] = keys[tasks[number].name]
        self.rewritten += len(changed)
        self.skipped += len(keys) - len(changed)

    def close(self) -> None:
        """Let go of the model, the sources and the threads."""
        for _, merger in self._mergers.values():
            merger.close()
        self.live.close()
        if self._shared is None:
            self._files.close()

    def _take(self, task: TensorTask, raw: Any) -> None:
        """Copy a merged tensor into its parameter; called by the pool's threads."""
        import torch

        tensor = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(raw)
        stored = tensor.view(torch_dtype(task.dtype))
        with torch.no_grad():
            self._parameters[task.name].values.copy_(stored.reshape(task.shape))
