"""Check the output against the model class that its config names, before any weight is read.

A tensor that the class would make up, leave out or refuse is an error, unless a source has the same
fault: a merge makes no model worse. Stacked layers must be of the kind that they were: a config may
say by number which layers use a sliding window, have experts or do without positions.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from merge_cli.checkpoint.class_config import UnknownClass
from merge_cli.checkpoint.config import layer_count
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import MismatchError, Problem
from merge_cli.planning.absent import BUFFERS
from merge_cli.planning.layers import heights, layers_of
from merge_cli.planning.skeleton import Kind, Shapes, Skeleton, build
from merge_cli.sources.source import Source
from merge_cli.system.untrusted import read_mapping

_NUMBER = re.compile(r"\d+")
_DTYPES = ("dtype", "torch_dtype")


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


def check_structure(
    config: Mapping[str, object],
    shapes: Shapes,
    config_source: Source,
    source_tensors: Mapping[str, Tensor],
    sources: Iterable[Source],
    origins: Origins | None = None,
) -> list[str]:
    """Hold an output's config, names and shapes against its class.

    Args:
        config: the output's.
        config_source: whose config it is made from.
        source_tensors: of the config source; an output with its names, shapes and config is not
            checked, unless layers are missing that the config counts.
        sources: every model, whose own faults are no news.
        origins: of layers that were stacked.

    Returns:
        notes for the plan.

    Raises:
        MismatchError: transformers would not open it, or open it as something else.
        ValueError: a rule by position that the stacked layers may not follow, where the class that
            would tell is not known.
    """
    if not config_source.config or "" not in config_source.stems:
        return _undecided(origins, "")
    shapes = _model_shapes(shapes, config_source)
    if (
        origins is None
        and _unchanged(config, shapes, config_source, source_tensors)
        and _has_layers(config, shapes)
    ):
        return []
    try:
        made = _build(config, shapes, origins is not None)
    except UnknownClass as reason:
        return _undecided(origins, str(reason))
    inherited = _Inherited(config_source, sources)
    problems = [*_failures(made, inherited), *_differences(made, inherited)]
    notes: list[str] = []
    if origins is not None and not problems:
        problems, notes = _other_kinds(made, origins)
    if problems and origins is not None and origins.doubts:
        raise ValueError(origins.doubts[0])
    if problems:
        raise MismatchError(problems, f"{made.name} would not open what this makes")
    return [*notes, *_faults(made)]


def _undecided(origins: Origins | None, reason: str) -> list[str]:
    if origins is not None and origins.doubts:
        raise ValueError(origins.doubts[0])
    if not reason:
        return []
    return [f"whether the output opens could not be checked: {reason}"]


def _unchanged(
    config: Mapping[str, object],
    shapes: Shapes,
    config_source: Source,
    source_tensors: Mapping[str, Tensor],
) -> bool:
    """Whether the output has the layout of its config source: then it opens as that does."""
    before = config_source.config
    if config_source.adapter is not None:
        if any(
            tensor.stored[0].shape[:1] != tensor.shape[:1] for tensor in source_tensors.values()
        ):
            return False
        before = read_mapping(config_source.root / "config.json", config_source.label)
    if _plain(before) != _plain(config):
        return False
    stored = [*map(attrgetter("shape"), source_tensors.values())]
    if len(shapes) == len(stored) and [*map(shapes.get, source_tensors)] == stored:
        return True
    there: Shapes = dict(zip(source_tensors, stored, strict=True))
    there = _model_shapes(there, config_source)
    return there == shapes or _without_buffers(there) == _without_buffers(shapes)


def _has_layers(config: Mapping[str, object], shapes: Shapes) -> bool:
    """Whether some stack has all the layers that the config counts, or it counts none.

    More may stand behind them, for predicting several tokens.
    """
    count, stacks = layer_count(config), heights(layers_of([*shapes])).values()
    return count is None or not stacks or max(stacks) >= count


def _without_buffers(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.endswith(BUFFERS)}


def _model_shapes(shapes: Shapes, source: Source) -> Shapes:
    """Those of the model itself, without the parts in other folders (see `components`)."""
    parts = tuple(f"{folder}/" for folder in source.stems if folder)
    if not parts:
        return shapes
    return {name: shape for name, shape in shapes.items() if not name.startswith(parts)}


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """A config without dtypes."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _DTYPES
    }


_built: dict[tuple[str, frozenset[tuple[str, tuple[int, ...]]], bool], Skeleton] = {}


def _build(config: Mapping[str, object], shapes: Shapes, kinds: bool) -> Skeleton:
    """As `build`; the last few are remembered, since searches plan one structure many times."""
    key = json.dumps(config, sort_keys=True), frozenset(shapes.items()), kinds
    if key not in _built:
        while len(_built) > 7:
            del _built[next(iter(_built))]
        _built[key] = build(config, shapes, kinds=kinds)
        gc.collect(0)  # a model refers to itself, and `make_plan` searches for no cycles
    return _built[key]


def _of(source: Source, kinds: bool = False) -> Skeleton | None:
    """A source as its class opens it; None where that is not known."""
    try:
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        return _build(source.config, _model_shapes(shapes, source), kinds)
    except UnknownClass:
        return None


class _Inherited:
    """What is wrong with the sources themselves, looked up when something is wrong."""

    def __init__(self, config_source: Source, sources: Iterable[Source]) -> None:
        self._config_source = config_source
        self._sources = [
            config_source,
            *(source for source in sources if source is not config_source),
        ]

    @property
    def fails(self) -> bool:
        """Whether the class refuses it."""
        built = _of(self._config_source)
        return built is None or bool(built.failure)

    def has(self, problem: str, name: str) -> bool:
        """Whether a source has the same fault with every tensor of this kind."""
        pattern = _pattern(name)
        for source in self._sources:
            built = _of(source)
            if built is None or built.failure:
                continue
            faulty = {_pattern(other) for other in getattr(built, problem)}
            if pattern in faulty and not self._has_sound(source, problem, built, pattern):
                return True
        return False

    @staticmethod
    def _has_sound(source: Source, problem: str, built: Skeleton, pattern: str) -> bool:
        sound = source.tensors.keys() - set(getattr(built, problem))
        return any(_pattern(name) == pattern for name in sound)


def _pattern(name: str) -> str:
    """A name in any layer, of any expert."""
    return _NUMBER.sub("*", name)


def _failures(made: Skeleton, inherited: _Inherited) -> Iterator[Problem]:
    if made.failure and not inherited.fails:
        yield Problem(f"it refuses config.json or the tensors: {made.failure}")


def _differences(made: Skeleton, inherited: _Inherited) -> Iterator[Problem]:
    words = {
        "missing": "the output lacks it, and it would be made up",
        "unexpected": "it has no such tensor, and would leave it out",
        "wrong": "of another shape",
    }
    for problem, message in words.items():
        names = getattr(made, problem)
        groups: dict[str, list[str]] = {}
        for name in sorted(names):
            groups.setdefault(_pattern(name), []).append(name)
        for first, *others in groups.values():
            if inherited.has(problem, first):
                continue
            if problem == "wrong":
                stored, requested = made.wrong[first]
                message = f"the output has {list(stored)}, the class wants {list(requested)}"
            more = f" ({len(others)} more like it)" if others else ""
            yield Problem(message + more, first)


def _faults(made: Skeleton) -> Iterator[str]:
    """What a merge takes over from its sources."""
    if made.failure:
        yield f"whether the output opens could not be checked: {made.failure}"
    for problem, message in (("missing", "lacks"), ("unexpected", "does not use")):
        names = sorted(getattr(made, problem))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"{made.name} {message} {names[0]}{more}, as in the sources"


def _other_kinds(made: Skeleton, origins: Origins) -> tuple[list[Problem], list[str]]:
    """Stacked layers that the class would make into something else than they were."""
    skeletons = {source.label: _of(source, kinds=True) for source, _ in origins.layers}
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
