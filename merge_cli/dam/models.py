"""The student's net, and which of its parameters are merged from which stored tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.dam.coefficients import Layout, layout_of
from merge_cli.dam.sources import Stored
from merge_cli.engine.plan import Plan, TensorTask
from merge_cli.errors import Problem, SourceError
from merge_cli.evaluation.live import quiet
from merge_cli.recipe.training import Training


@dataclass(frozen=True)
class Target:
    """One merged tensor of the output.

    Attributes:
        parameter: the student's name for it; None where the student has no such parameter.
        layout: of its coefficients.
        trained: whether they are learned; otherwise they stay as they start.
    """

    task: TensorTask
    parameter: str | None
    layout: Layout
    trained: bool

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def count(self) -> int:
        """Coefficients that are learned, of all sources."""
        return self.layout.count * len(self.task.operands) if self.trained else 0


def reason(error: BaseException) -> str:
    """The first line of a message; the kind of error where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def student_config(plan: Plan) -> Any:
    """The output's config, without dropout: a loss must not depend on chance.

    Raises:
        SourceError: transformers does not know the architecture.
    """
    from transformers import AutoConfig

    donor = plan.sources[plan.donor]
    with quiet():
        try:
            config = AutoConfig.from_pretrained(str(donor.root), trust_remote_code=False)
        except Exception as error:  # a config's own code checks it, with errors of any kind
            what = f"transformers cannot read its config: {reason(error)}"
            raise SourceError(what, model=donor.label) from error
    if "tie_word_embeddings" in plan.config:
        config.tie_word_embeddings = plan.config["tie_word_embeddings"]
    _drop_nothing(config)
    config.use_cache = False
    return config


def _drop_nothing(config: Any) -> None:
    """No dropout in a config and in the configs inside it, whatever a model calls it."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            _drop_nothing(value)


def empty_student(plan: Plan) -> Any:
    """The student without weights: names, shapes and kinds of layers."""
    import torch
    from transformers import AutoModelForCausalLM

    config = student_config(plan)
    with quiet(), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # of any kind: what a model makes of sizes that do not fit
            what = f"is no causal language model that transformers knows: {reason(error)}"
            raise SourceError(what, model=plan.sources[plan.donor].label) from error


def load_student(plan: Plan, device: str, dtype: Any) -> Any:
    """The student with the donor's weights, which are about to be replaced."""
    import torch
    from transformers import AutoModelForCausalLM

    donor = plan.sources[plan.donor]
    with quiet():
        try:
            net = AutoModelForCausalLM.from_pretrained(
                str(donor.root), config=student_config(plan), dtype=dtype, trust_remote_code=False
            )
        except MemoryError:
            raise
        except Exception as error:  # a config can break transformers in any way it likes
            if type(error).__name__ == "OutOfMemoryError":
                raise
            what = f"transformers cannot load it: {reason(error)}"
            raise SourceError(what, model=donor.label) from error
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):  # whatever name its config gave it
            module.p = 0.0
    return net.to(device).eval()


class ParameterNames:
    """What a net calls its parameters, by what files call them: the same, or without a prefix."""

    def __init__(self, net: Any) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        self._ends: dict[str, list[str]] = {}
        for name in self._shapes:
            parts = name.split(".")
            for i in range(len(parts)):
                self._ends.setdefault(".".join(parts[i:]), []).append(name)

    def of(self, stored: str, shape: tuple[int, ...]) -> str | None:
        """The parameter that a stored tensor of this name and shape is, if it is one."""
        fitting = [stored] if stored in self._shapes else self._ends.get(stored, [])
        found = fitting[0] if len(fitting) == 1 else None
        return found if found is not None and self._shapes[found] == shape else None


def find_targets(plan: Plan, net: Any, training: Training) -> tuple[list[Target], list[Problem]]:
    """Every merged tensor of the plan with its parameter, and parameters that have none.

    transformers may call a parameter otherwise than the file does (a prefix), or build it from
    several stored tensors: a coefficient cannot follow the second kind.
    """
    parameters = dict(net.named_parameters())
    kinds, names = kinds_of(net), ParameterNames(net)
    targets: list[Target] = []
    found: set[str] = set()
    for task in plan.tasks:
        if task.action != "merge":
            continue
        name = names.of(task.name, task.shape)
        trained = name is not None and is_trained(name, kinds.get(name, ""), training.train)
        granularity = training.granularity if trained else "tensor"
        first = name is not None and kinds.get(name) == "conv1d"
        layout = layout_of(task.shape, granularity, training.rank, input_first=first)
        targets.append(Target(task, name, layout, trained))
        found |= {name} if name else set()
    problems = [
        Problem("transformers builds it from tensors that are stored otherwise: its coefficients "
                "cannot be learned, and no student can be made", name)
        for name in parameters if name not in found
    ]  # fmt: skip
    return targets, problems


def is_trained(name: str, kind: str, patterns: Sequence[str]) -> bool:
    """Whether `train:` chooses a parameter: all, linear layers, or a part of its name."""
    return any(
        pattern == "all"
        or (pattern == "linear" and kind in ("linear", "conv1d"))
        or (pattern not in ("all", "linear") and pattern in name)
        for pattern in patterns
    )


def stored_tensors(plan: Plan, targets: Sequence[Target]) -> dict[str, Stored]:
    """Where the sources have each target, and the base, if there is one."""
    views = plan.aligned.views
    base = views[plan.base] if plan.base is not None else {}
    found = {}
    for target in targets:
        task, layout = target.task, target.layout
        ref = task.base or base.get(target.name)
        found[target.name] = Stored(
            target.name, (layout.rows, layout.columns), task.operands,
            ref if ref is not None and ref.shape == task.shape else None,
        )  # fmt: skip
    return found


def weight_bytes(stored: Mapping[str, Stored], *, with_base: bool) -> int:
    """Bytes of all sources together, and of the base."""
    return sum(
        ref.nbytes
        for one in stored.values()
        for ref in (*one.sources, *([one.base] if with_base and one.base else []))
    )


def parameter_count(targets: Sequence[Target]) -> int:
    return sum(math.prod(target.task.shape) for target in targets)


def kinds_of(net: Any) -> dict[str, str]:
    """Parameter -> linear, conv1d (stored input first), or other."""
    return dict(_walk(net))


def _walk(net: Any) -> Iterator[tuple[str, str]]:
    import torch

    embeddings = {id(module.weight) for module in net.modules()
                  if isinstance(module, torch.nn.Embedding)}  # fmt: skip
    for prefix, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "other"
            if isinstance(module, torch.nn.Linear) and id(parameter) not in embeddings:
                kind = "linear"
            elif type(module).__name__ == "Conv1D" and name == "weight":
                kind = "conv1d"
            yield f"{prefix}.{name}".lstrip("."), kind
