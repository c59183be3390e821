"""Which tensors become factors, which are saved in full, and which are left out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_cli.adapters.known_modules import KnownModules
from merge_cli.adapters.pair import ExpertMatrix, ModuleMap, ModuleParameter
from merge_cli.planning.plan import TensorTask
from merge_cli.recipe.values import matches


@dataclass(frozen=True)
class Selection:
    """Decides what becomes factors, what is saved in full, and what is left out."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    transposed: bool
    embeddings: bool
    stacks: frozenset[str] = frozenset()  # modules whose experts get factors

    def why_left_out(self, task: TensorTask, parameter: ModuleParameter | None) -> str:
        """Why a tensor's change is not in the adapter; empty where it is."""
        if any(matches(pattern, task.name) for pattern in self.exclude):
            return "excluded"
        if parameter is None:
            return "transformers holds it in another form"
        if parameter.module in self.stacks:
            return "in a module whose experts have factors: PEFT keeps nothing else there"
        if parameter.kind == "embedding":
            return "" if self.embeddings else "an embedding: --embeddings gives it factors"
        if parameter.kind == "inner":
            return "a parameter of a module that is no layer"
        linear = parameter.kind in ("linear", "conv1d")
        if linear and parameter.name == "weight":
            if self.transposed and parameter.kind == "linear":
                return "stored [out, in], in a model whose layers are stored [in, out]"
            if self.include and not any(matches(p, task.name) for p in self.include):
                return "not included"
        return ""

    def takes(self, names: Sequence[str]) -> bool:
        """Whether the matrix of an expert, stored in these tensors, gets factors."""
        if any(matches(pattern, name) for pattern in self.exclude for name in names):
            return False
        included = (matches(pattern, name) for pattern in self.include for name in names)
        return not self.include or any(included)

    def factors(self, task: TensorTask, parameter: ModuleParameter | None) -> bool:
        """Whether its change becomes factors."""
        if parameter is None or self.why_left_out(task, parameter):
            return False
        layer = parameter.kind in ("linear", "conv1d", "embedding") and parameter.name == "weight"
        return layer and len(task.shape) == 2


def selected_experts(
    modules: ModuleMap | KnownModules, tasks: Mapping[str, TensorTask], selection: Selection
) -> list[ExpertMatrix]:
    """Matrices of experts that get factors: all experts of a parameter, or none."""
    experts = modules.experts({name: task.shape for name, task in tasks.items()})
    complete = [
        parts
        for parts in experts.values()
        if not selection.transposed and all(selection.takes(part.tensors) for part in parts)
    ]
    return [part for parts in complete for part in parts]
