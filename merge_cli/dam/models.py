"""The student's net, and which of its parameters are merged from which stored tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.dam.coefficients import CoefficientLayout, layout_of
from merge_cli.dam.sources import Stored, kept_wide
from merge_cli.engine.parameter_slices import by_name, filled_layers, layer_of
from merge_cli.errors import Problem, SourceError
from merge_cli.evaluation.empty import embeddings_of, kind_of_expert, kinds_of, model_config, reason
from merge_cli.evaluation.guards import quiet_libraries
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.recipe.training import Training


@dataclass(frozen=True)
class TargetParameter:
    """One merged tensor of the output.

    Attributes:
        held: whether the student has it, as a parameter or as a part of one.
        layout: of its coefficients.
        trained: whether they are learned; otherwise they stay as they start.
    """

    task: TensorTask
    held: bool
    layout: CoefficientLayout
    trained: bool

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def count(self) -> int:
        """Coefficients that are learned, of all sources."""
        return self.layout.count * len(self.task.operands) if self.trained else 0


def load_student(plan: Plan, device: str, dtype: Any) -> Any:
    """The student with the config source's weights, which are about to be replaced."""
    import torch
    from transformers import AutoModelForCausalLM

    config_source = plan.sources[plan.config_index]
    with quiet_libraries():
        try:
            net = AutoModelForCausalLM.from_pretrained(
                str(config_source.root),
                config=model_config(plan),
                dtype=dtype,
                trust_remote_code=False,
            )
        except MemoryError:
            raise
        except Exception as error:  # a config can break transformers in any way it likes
            if type(error).__name__ == "OutOfMemoryError":
                raise
            message = f"transformers cannot load it: {reason(error)}"
            raise SourceError(message, model=config_source.label) from error
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):  # whatever name its config gave it
            module.p = 0.0
    return net.to(device).eval()


def find_targets(
    plan: Plan, net: Any, training: Training
) -> tuple[list[TargetParameter], list[Problem]]:
    """Every merged tensor of the plan, and parameters of the student that nothing stored fills.

    transformers may call a parameter otherwise than the file does, or stack several stored
    matrices. Where these lie is seen once the student has weights; until then it is enough that
    they fill, layer by layer, what no tensor's name is for.
    """
    parameters = dict(net.named_parameters())
    kinds, embeddings = kinds_of(net), embeddings_of(net)
    merged = [task for task in plan.tasks if task.action == "merge"]
    names = by_name({task.name: task.shape for task in merged}, parameters)
    open_names = parameters.keys() - names.values()
    loose = [task for task in merged if task.name not in names]
    filled = filled_layers(
        {name: parameters[name] for name in open_names}, {task.name: task.size for task in loose}
    )
    targets = []
    for task in merged:
        held = task.name in names or layer_of(task.name) in filled
        name = names.get(task.name, task.name)
        kind = kinds.get(name, kind_of_expert(name, len(task.shape)))
        trained = held and is_trained(name, kind, training.train)
        of_tokens = name in embeddings
        granularity = (
            training.granularity_of(task.name, embedding=of_tokens) if trained else "tensor"
        )
        layout = layout_of(task.shape, granularity, training.rank, input_first=kind == "conv1d")
        targets.append(TargetParameter(task, held, layout, trained))
    problems = [
        Problem(
            "transformers builds it from tensors that are stored otherwise: its coefficients "
            "cannot be learned, and no student can be made",
            name,
        )
        for name in parameters
        if name in open_names and layer_of(name) not in filled
    ]
    return targets, problems


def is_trained(name: str, kind: str, patterns: Sequence[str]) -> bool:
    """Whether `train:` chooses a parameter: all, linear layers, or a part of its name."""
    return any(
        pattern == "all"
        or (pattern == "linear" and kind in ("linear", "conv1d"))
        or (pattern not in ("all", "linear") and pattern in name)
        for pattern in patterns
    )


def stored_tensors(plan: Plan, targets: Sequence[TargetParameter]) -> dict[str, Stored]:
    """Where the sources have each target, and the base, if there is one."""
    views = plan.aligned.views
    base = views[plan.base] if plan.base is not None else {}
    result = {}
    for target in targets:
        task, layout = target.task, target.layout
        ref = task.base or base.get(target.name)
        result[target.name] = Stored(
            target.name,
            (layout.rows, layout.columns),
            task.operands,
            ref if ref is not None and ref.shape == task.shape else None,
        )
    return result


def weight_bytes(stored: Mapping[str, Stored], *, with_base: bool, on_cpu: bool) -> int:
    """Bytes of all sources together, and of the base, as they are kept in memory."""
    wide = on_cpu and kept_wide(stored, with_base=with_base)
    return sum(
        max(ref.nbytes, 4 * ref.size if wide else 0)
        for item in stored.values()
        for ref in (*item.sources, *([item.base] if with_base and item.base else []))
    )


def parameter_count(targets: Sequence[TargetParameter]) -> int:
    return sum(math.prod(target.task.shape) for target in targets)
