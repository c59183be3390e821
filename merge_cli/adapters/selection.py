"""Which tensors become factors, which are saved in full, and which are left out, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from merge_cli.adapters.fine_tune import FineTune
from merge_cli.adapters.pair import ExpertMatrix, ModuleParameter
from merge_cli.adapters.wrapping import takes_factors
from merge_cli.errors import UsageError
from merge_cli.planning.plan import TensorTask
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.values import filter_error, matches


@dataclass(frozen=True)
class Selection:
    """Decides what becomes factors, what is saved in full, and what is left out."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    transposed: bool
    embeddings: bool
    model_type: object = None
    stacks: frozenset[str] = frozenset()  # modules whose experts get factors

    def why_left_out(self, task: TensorTask, parameter: ModuleParameter | None) -> str:
        """Why a tensor's change is not in the adapter; empty where it is."""
        if any(matches(pattern, task.name) for pattern in self.exclude):
            return "excluded"
        if parameter is None:
            return "transformers holds it in another form"
        if parameter.module in self.stacks:
            return "in a module whose experts have factors: PEFT keeps nothing else there"
        if parameter.kind in ("embedding", "table") and not self.embeddings:
            gives = "gives it factors" if parameter.kind == "embedding" else "saves it in full"
            return f"an embedding: --embeddings {gives}"
        if parameter.kind == "inner":
            return "a parameter of a module that is no layer"
        linear = parameter.kind in ("linear", "conv1d")
        if linear and parameter.name == "weight":
            if self.transposed and parameter.kind == "linear":
                return "stored [out, in], in a model whose layers are stored [in, out]"
            if self.include and not any(matches(p, task.name) for p in self.include):
                return "not included"
            if not takes_factors(parameter.module, self.model_type):
                return f"PEFT puts no factors on this layer of {self.model_type} models"
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


def select(
    pair: FineTune, include: Sequence[str], exclude: Sequence[str], *, embeddings: bool
) -> tuple[Selection, list[ExpertMatrix]]:
    """What gets factors: a rule for tensors, and matrices of experts: all of a parameter, or none.

    Raises:
        UsageError: `include` names no layer that could have factors.
    """
    kind = pair.base.config.get("model_type")
    selection = Selection(tuple(include), tuple(exclude), pair.transposed, embeddings, kind)
    complete = [
        parts
        for parts in pair.experts.values()
        if not pair.transposed and all(selection.takes(part.tensors) for part in parts)
    ]
    experts = [part for parts in complete for part in parts]
    selection = replace(selection, stacks=frozenset(part.position.module for part in experts))
    layers = [t for n, t in pair.tasks.items() if selection.factors(t, pair.parameters.get(n))]
    if include and not experts and not layers:
        raise _nothing_included(pair, include)
    return selection, experts


def _nothing_included(pair: FineTune, include: Sequence[str]) -> UsageError:
    quoted = ", ".join(f"'{filter}'" for filter in include)
    hint = "It selects layers that get factors. Norms and biases are saved without it."
    if not any(matches(filter, name) for filter in include for name in pair.tasks):
        layers = (p.module for p in pair.parameters.values() if p.kind in ("linear", "conv1d"))
        hint = nearest(include[0], {module.rpartition(".")[2] for module in layers})
    return UsageError(f"--include {quoted} matches no layer that can have factors", hint=hint)


def check_filters(include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse filters that cannot be read.

    Raises:
        UsageError: one that is empty, or no regular expression.
    """
    for flag, filters in (("--include", include), ("--exclude", exclude)):
        for filter in filters:
            if not filter:
                hint = "Give a part of a tensor's name, as in recipes."
                raise UsageError(f"{flag} has an empty filter", hint=hint)
            if why := filter_error(filter):
                raise UsageError(f"{flag} {filter[:60]!r}: {why}")


def unused_filters(
    include: Sequence[str], exclude: Sequence[str], names: Collection[str]
) -> Iterator[str]:
    """One line for each filter that matches none of the names."""
    for flag, filters in (("--include", include), ("--exclude", exclude)):
        for filter in filters:
            if not any(matches(filter, name) for name in names):
                yield f"{flag} '{filter}' matches no tensor and has no effect"
