"""What an adapter holds in full beside its factors: single biases, and modules completely.

PEFT loads no adapter without factors. Where no layer has any, one gets factors of zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_cli.adapters.extracted import ModuleChange, changes_left_out
from merge_cli.adapters.factors import zeros
from merge_cli.adapters.fine_tune import FineTune
from merge_cli.adapters.folder import AdapterFolder
from merge_cli.adapters.pair import ModuleParameter
from merge_cli.adapters.selection import Selection
from merge_cli.adapters.wrapping import Wrapping
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import SourceError


@dataclass(frozen=True)
class SavedTensors:
    """Tensors of a fine-tune that an adapter has in full.

    Attributes:
        tensors: by their names in the adapter.
        modules: those that PEFT has to replace (`modules_to_save`).
        biases: whether single tensors of layers are among them.
        unsaved: tensors that PEFT could not load, by their names in the files, and why.
        targets: the layers that get factors, as PEFT finds them (`target_modules`).
        notes: for a reader of the result.
    """

    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...]
    biases: bool
    unsaved: Mapping[str, str]
    targets: Sequence[str] | str
    notes: tuple[str, ...] = ()


def save_rest(
    adapter: AdapterFolder, changes: Sequence[ModuleChange], pair: FineTune, selection: Selection
) -> SavedTensors:
    """Put what has changed and has no factors into an adapter that has all of its factors.

    Args:
        changes: of all tensors.

    Raises:
        SourceError: nothing has changed, or nothing of the change can be in the adapter.
    """
    names = [change.name for change in changes if change.rank is None and not change.why]
    left_out = {change.name for change in changes if change.why}
    wrapping = Wrapping(pair.modules, adapter.ranks, selection.stacks)
    saved = _choose(names, left_out, pair, wrapping)
    held = [change.with_why(saved.unsaved.get(change.name, "")) for change in changes]
    if all(change.why for change in held):
        raise _nothing_held(held, pair)
    if not adapter.ranks and not adapter.parameters:
        module = _add_zeros(adapter, pair, selection, wrapping, saved)
        wrapping = Wrapping(pair.modules, adapter.ranks, selection.stacks)
        saved = _choose(names, left_out, pair, wrapping)
        note = f"no layer gets factors, and PEFT needs some: those of {module} are zeros"
        saved = replace(saved, notes=(note,))
    for name, tensor in saved.tensors.items():
        adapter.keep(name, tensor)
    return saved


def _choose(
    changed: Sequence[str], left_out: Collection[str], pair: FineTune, wrapping: Wrapping
) -> SavedTensors:
    """Tensors of layers alone, and of other modules everything: PEFT keeps a copy of those.

    Args:
        changed, left_out: names in the files.
    """
    parameters = pair.parameters
    at_hand = {f"{parameter.module}.{parameter.name}" for parameter in parameters.values()}
    alone = {name for name in changed if _is_alone(parameters[name])}
    listed = dict.fromkeys(parameters[name].module for name in changed if name not in alone)
    why_not = {module: wrapping.why_not_saved(module, at_hand) for module in listed}
    modules = tuple(module for module in listed if not why_not[module])
    complete = {other for module in modules for other in wrapping.saved_with(module)}
    tensors = {
        wrapping.name_of(parameters[name]): tensor
        for name, tensor in pair.tensors(left_out).items()
        if name in alone or (name in parameters and parameters[name].module in complete)
    }
    unsaved = {n: why for n in changed if n not in alone and (why := why_not[parameters[n].module])}
    return SavedTensors(tensors, modules, bool(alone), unsaved, wrapping.targets())


def _is_alone(parameter: ModuleParameter) -> bool:
    """Whether PEFT loads it without its module: a layer's bias."""
    return parameter.kind in ("linear", "conv1d")


def _add_zeros(
    adapter: AdapterFolder,
    pair: FineTune,
    selection: Selection,
    wrapping: Wrapping,
    saved: SavedTensors,
) -> str:
    """Factors of zeros for the smallest layer that can have some. Returns its module.

    Raises:
        SourceError: there is no such layer.
    """
    anything = replace(selection, include=(), exclude=(), embeddings=True)
    layers = [
        (task.size, parameter, task.shape)
        for name, task in pair.tasks.items()
        if (parameter := pair.parameters.get(name))
        and anything.factors(task, parameter)
        and all(wrapping.keeps_factors(parameter.module, module) for module in saved.modules)
    ]
    if not layers:
        message = "no layer of the model can have factors, and PEFT loads no adapter without"
        raise SourceError(message, model=pair.tuned.label)
    _, parameter, shape = min(layers, key=lambda layer: layer[0])
    adapter.add(parameter.module, zeros(shape), embedding=parameter.kind == "embedding")
    return parameter.module


def _nothing_held(changes: Sequence[ModuleChange], pair: FineTune) -> SourceError:
    if not changes:
        message = f"it equals its base {pair.base.label}: there is no change to extract"
        return SourceError(message, model=pair.tuned.label)
    reasons = [
        f"{count} tensor{'s' * (count != 1)} ({why})"
        for why, (count, _) in changes_left_out(changes).items()
    ]
    message = f"nothing that it has changed can be in the adapter: {'; '.join(reasons)}"
    return SourceError(message, model=pair.tuned.label)
