"""A fine-tune and its base, tensor by tensor, with the modules that transformers has for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from merge_cli.adapters.known_modules import known_modules
from merge_cli.adapters.pair import ExpertMatrix, Module, ModuleMap, ModuleParameter
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class FineTune:
    """A pair of models.

    Attributes:
        tasks: pairs of tensors, by the names in the files.
        parameters: what each tensor is in the model; none for those that transformers converts.
        modules: all of the model's, by name.
        experts: by the parameter's name, the matrices of its experts.
        task_type: PEFT's word for the model's task; None leaves it open.
    """

    plan: Plan
    tasks: Mapping[str, TensorTask]
    parameters: Mapping[str, ModuleParameter]
    modules: Mapping[str, Module]
    experts: Mapping[str, tuple[ExpertMatrix, ...]]
    task_type: str | None

    @property
    def base(self) -> Source:
        return self.plan.sources[self.plan.base or 0]

    @property
    def tuned(self) -> Source:
        return self.plan.sources[self.plan.operands[0]]

    @property
    def transposed(self) -> bool:
        """Whether its layers are stored [in, out]."""
        return any(parameter.kind == "conv1d" for parameter in self.parameters.values())

    def tensors(self, left_out: Collection[str] = ()) -> dict[str, Tensor]:
        """The fine-tune's tensors, by the names in the files.

        Args:
            left_out: those that are taken from the base.
        """
        return {
            name: task.base if task.base and name in left_out else self._tensor(task)
            for name, task in self.tasks.items()
        }

    def _tensor(self, task: TensorTask) -> Tensor:
        """Its own one: a task without a base is the base's, as integers are not merged."""
        tuned = None if task.base else self.tuned.tensors.get(task.name)
        return tuned if tuned is not None and tuned.shape == task.shape else task.operands[0]


def look_up_modules(plan: Plan) -> FineTune:
    """Find the modules of a pair's tensors.

    Args:
        plan: by `pair.plan_pair`.

    Raises:
        SourceError: transformers has no class for the model.
    """
    base, tasks = plan.sources[plan.base or 0], {task.name: task for task in plan.tasks}
    shapes = {name: task.shape for name, task in tasks.items()}
    modules = known_modules(base.config, shapes) or ModuleMap(base)
    return FineTune(
        plan,
        tasks,
        modules.parameters(shapes),
        modules.modules(shapes),
        modules.experts(shapes),
        modules.task_type,
    )
