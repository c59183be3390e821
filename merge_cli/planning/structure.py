"""Check the output against the model class that its config names, before any weight is read.

A tensor that the class would make up, leave out or refuse is an error, unless a source has the same
fault: a merge makes no model worse. Stacked layers must be of the kind that they were: a config may
say by number which layers use a sliding window, have experts or do without positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from operator import attrgetter

from merge_cli.checkpoint.class_config import UnknownClass
from merge_cli.checkpoint.config import layer_count, text_config
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import MismatchError, Problem
from merge_cli.planning.absent import BUFFERS
from merge_cli.planning.layers import heights, layers_of
from merge_cli.planning.skeleton import Shapes, Skeleton, model_shapes, remembered, skeleton_of
from merge_cli.planning.stacked_kinds import Origins, other_kinds
from merge_cli.sources.source import Source
from merge_cli.system.untrusted import read_mapping

_NUMBER = re.compile(r"\d+")
_DTYPES = ("dtype", "torch_dtype")
_TOKEN = "_token_id"


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
    shapes = model_shapes(shapes, config_source)
    if (
        origins is None
        and _unchanged(config, shapes, config_source, source_tensors)
        and _has_layers(config, shapes)
    ):
        return []
    try:
        made = remembered(config, shapes, origins is not None)
    except UnknownClass as reason:
        return _undecided(origins, str(reason))
    inherited = _Inherited(config_source, sources)
    problems = [*_failures(made, inherited), *_differences(made, inherited)]
    notes: list[str] = []
    if origins is not None and not problems:
        problems, notes = other_kinds(made, origins)
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
    """Whether the output has the layout of its config source: then it opens as that does.

    Tokens may be others, and more or fewer, if every tensor with a row for each has them.
    """
    before = config_source.config
    if config_source.adapter is not None:
        if any(
            tensor.stored[0].shape[:1] != tensor.shape[:1] for tensor in source_tensors.values()
        ):
            return False
        before = read_mapping(config_source.root / "config.json", config_source.label)
    stored = [*map(attrgetter("shape"), source_tensors.values())]
    tokens, tokens_before = (text_config(c).get("vocab_size") for c in (config, before))
    if tokens != tokens_before and type(tokens) is type(tokens_before) is int:
        before = _with_tokens(before, tokens)
        stored = [(tokens, *s[1:]) if s[:1] == (tokens_before,) else s for s in stored]
    if not _ids_fit(config, before, tokens != tokens_before) or _plain(before) != _plain(config):
        return False
    if len(shapes) == len(stored) and [*map(shapes.get, source_tensors)] == stored:
        return True
    there: Shapes = dict(zip(source_tensors, stored, strict=True))
    there = model_shapes(there, config_source)
    return there == shapes or _without_buffers(there) == _without_buffers(shapes)


def _has_layers(config: Mapping[str, object], shapes: Shapes) -> bool:
    """Whether some stack has all the layers that the config counts, or it counts none.

    More may stand behind them, for predicting several tokens.
    """
    count, stacks = layer_count(config), heights(layers_of([*shapes])).values()
    return count is None or not stacks or max(stacks) >= count


def _without_buffers(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.endswith(BUFFERS)}


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """A config without dtypes, and without the numbers of tokens."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _DTYPES and not key.endswith(_TOKEN)
    }


def _with_tokens(config: Mapping[str, object], count: int) -> dict[str, object]:
    """The config of a model with so many tokens."""
    changed = deepcopy(dict(config))
    text_config(changed)["vocab_size"] = count
    return changed


def _ids_fit(config: Mapping[str, object], before: Mapping[str, object], resized: bool) -> bool:
    """Whether numbers of tokens that may be wrong now are among the output's tokens.

    Args:
        resized: there are more or fewer than before; else only numbers that have changed may be.
    """
    tokens = text_config(config).get("vocab_size")
    now, earlier = dict(_token_ids(config)), dict(_token_ids(before))
    for key, value in now.items():
        is_kept = key in earlier and value == earlier[key]
        if is_kept and (value is None or not resized):
            continue
        listed = value if isinstance(value, list) else [value]
        if not all(type(n) is int and type(tokens) is int and 0 <= n < tokens for n in listed):
            return False
    return now.keys() == earlier.keys()


def _token_ids(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Numbers of tokens, or lists of them, by the path of their keys."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value, f"{path}{key}.")
        elif key.endswith(_TOKEN):
            yield f"{path}{key}", value


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
        built = skeleton_of(self._config_source)
        return built is None or bool(built.failure)

    def has(self, problem: str, name: str) -> bool:
        """Whether a source has the same fault with every tensor of this kind."""
        pattern = _pattern(name)
        for source in self._sources:
            built = skeleton_of(source)
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
