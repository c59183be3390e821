"""Whether stacked layers are what they were: a config may say by number which are of which kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.errors import Problem
from merge_cli.planning.skeleton import Kind, Skeleton, skeleton_of
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class Origins:
    """Where stacked layers come from.

    Attributes:
        stack: what their tensors' names begin with.
        layers: for each layer of the output, its source and its number there.
        doubts: rules of the config that they may not follow.
    """

    stack: str
    layers: Sequence[tuple[Source, int]]
    doubts: Sequence[str] = ()


def other_kinds(made: Skeleton, origins: Origins) -> tuple[list[Problem], list[str]]:
    """Stacked layers that the class would make into something else than they were."""
    skeletons = {source.label: skeleton_of(source, kinds=True) for source, _ in origins.layers}
    path = _stack_of(made, [skeleton for skeleton in skeletons.values() if skeleton], origins)
    if path is None or None in skeletons.values():
        if origins.doubts:
            raise ValueError(origins.doubts[0])
        return [], []
    problems, notes = [], []
    for out, (source, index) in enumerate(origins.layers):
        skeleton = skeletons[source.label]
        assert skeleton is not None
        counts = len(made.kinds[path]), len(skeleton.kinds[path])
        hard, soft = _unlike(
            made.kinds[path][out], skeleton.kinds[path][index], out - index, counts
        )
        whence = f"layer {index} of {source.label}"
        if hard:
            key, new, old = hard[0]
            message = f"would be of another kind than {whence}: {key} {new}, not {old}"
            hint = "config.json cannot say of these layers which are which."
            problems.append(Problem(message, f"{origins.stack}.{out}".lstrip("."), hint=hint))
        elif soft:
            key, new, old = soft[0]
            notes.append(
                f"{key} depends on a layer's number: {new} in layer {out}, which is "
                f"{whence} and had {old}"
            )
    return problems, notes[:1]


def _stack_of(made: Skeleton, skeletons: Sequence[Skeleton], origins: Origins) -> str | None:
    """The list of modules that the stacked layers are in."""
    needed = max(index for _, index in origins.layers) + 1 if origins.layers else 0
    fitting = [
        path
        for path, layers in made.kinds.items()
        if len(layers) == len(origins.layers)
        and all(path in skeleton.kinds for skeleton in skeletons)
    ]
    fitting = [
        path
        for path in fitting
        if any(len(skeleton.kinds[path]) >= needed for skeleton in skeletons)
    ]
    same = [path for path in fitting if path == origins.stack]
    parts = origins.stack.rpartition(".")[2]
    alike = same or [path for path in fitting if path.rpartition(".")[2] == parts] or fitting
    return alike[0] if len(alike) == 1 else None


Difference = tuple[str, object, object]


def _unlike(
    new: Kind, old: Kind, moved: int, counts: tuple[int, int]
) -> tuple[list[Difference], list[Difference]]:
    """What differs between two layers: in kind, and in numbers that follow the layer's.

    Args:
        moved: how far the layer has moved.
        counts: how many layers there are, and were.
    """
    kinds_there, there = dict(new), dict(old)
    hard: list[Difference] = []
    soft: list[Difference] = []
    for key in sorted(kinds_there.keys() | there.keys()):
        a, b = kinds_there.get(key), there.get(key)
        if key.startswith("config.") and None in (a, b):
            continue  # a list that one config writes out, and the other has as a rule
        if a == b and type(a) is type(b):
            continue
        if type(a) is int and type(b) is int and a - b == moved:
            continue  # the layer's own number, whatever it is called
        numbers = (type(a) is float and type(b) is float) or (a, b) == counts
        (soft if numbers else hard).append((key, a, b))
    return hard, soft
