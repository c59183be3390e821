"""A model as transformers would build it: its class on the meta device, without a byte of weights.

transformers itself says which tensors are missing, unexpected or of another shape, so that what it
renames, fuses, ties or ignores on loading is taken into account. The config is untrusted:
checkpoint/class_config.py decides what of it may reach a class.

`class_rules` answers less and runs nothing: it reads three attributes of a class that transformers
itself brings. Importing one takes seconds, so it is asked only when a tensor is missing.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from merge_cli.checkpoint.class_config import (
    UnknownClass,
    known_class,
    quiet_and_alone,
    without_choices,
)
from merge_cli.sources.source import Source

Shapes = Mapping[str, tuple[int, ...]]
Kind = tuple[tuple[str, Any], ...]  # what a layer is: (module and attribute, value), sorted

# Attributes of a module that say where it stands, or what everything inherits.
_PLACES = frozenset(("training", "layer_idx", "layer_id", "layer_index", "idx", "block_idx"))


@dataclass(frozen=True)
class Skeleton:
    """What a class makes of tensors.

    Attributes:
        name: of the class.
        missing: what it would make up.
        unexpected: what it would leave out.
        wrong: name -> (stored shape, the model's shape).
        kinds: for each stack of modules of one kind, what its layers are.
        failure: why the class or its loading refuses; empty where it does not.
    """

    name: str
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    kinds: Mapping[str, tuple[Kind, ...]] = field(default_factory=dict)
    failure: str = ""


def build(config: Mapping[str, Any], shapes: Shapes, *, kinds: bool = False) -> Skeleton:
    """Open tensors of some shapes with the class that a config names.

    Args:
        kinds: whether the layers' kinds are wanted, too.

    Raises:
        Unknown: no class is named, or transformers does not have it.
    """
    if "quantization_config" in config:
        raise UnknownClass("its weights are quantised")
    kind, settings = known_class(config)
    with quiet_and_alone():
        try:
            made = settings.from_dict(without_choices(config))
            return _opened(kind, kind.__name__, made, shapes, kinds)
        except Exception as error:
            # Whatever a model's class raises over a config or tensors that do not suit it.
            printed = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return Skeleton(kind.__name__, failure=printed)


def _opened(kind: Any, name: str, config: Any, shapes: Shapes, kinds: bool) -> Skeleton:
    import torch

    tensors = {
        key: torch.empty(shape, dtype=torch.float32, device="meta") for key, shape in shapes.items()
    }
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        device_map={"": "meta"},
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    wrong = {entry[0]: (tuple(entry[1]), tuple(entry[2])) for entry in info["mismatched_keys"]}
    opened = _kinds(model) if kinds else {}
    return Skeleton(
        name, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), wrong, opened
    )


def _kinds(model: Any) -> dict[str, tuple[Kind, ...]]:
    """Every list of modules, and what each module in it is but for where it stands."""
    from torch.nn import ModuleList

    stacks = {
        path: list(kinds) for path, kinds in model.named_modules() if isinstance(kinds, ModuleList)
    }
    listed = _listed(model.config)
    return {
        path: tuple(
            tuple(
                sorted(
                    [
                        *_kind(layer),
                        *(
                            (f"config.{key}", values[i])
                            for key, values in listed.items()
                            if len(values) == len(layers)
                        ),
                    ],
                    key=repr,
                )
            )
            for i, layer in enumerate(layers)
        )
        for path, layers in stacks.items()
    }


def _kind(layer: Any) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        yield f"{path}:", type(module).__name__
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and not key.startswith("_") and key not in _PLACES:
                yield f"{path}.{key}".lstrip("."), value
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}".lstrip("."), tuple(parameter.shape)


def _listed(config: Any) -> dict[str, list[Any]]:
    """What a config says of each layer, rules by position written out as the class does it."""
    part = config.get_text_config()
    result: dict[str, list[Any]] = {}
    for key in {*vars(part), "layer_types", "layers_block_type", "mlp_layer_types"}:
        value = getattr(part, key, None)
        if not isinstance(value, list) or not all(isinstance(item, str | int) for item in value):
            continue
        # Numbers of layers are no property of the layer that stands at their place.
        if not all(type(name) is int for name in value) or set(value) <= {0, 1}:
            result[key] = value
    return result


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


@dataclass(frozen=True)
class ClassRules:
    """What loading does about names.

    Attributes:
        skipped: patterns of tensors that loading skips where a file has them.
        computed: patterns of tensors that the model has and does not miss in a file.
        tied: pattern of a tensor -> the tensor that it is tied to.
    """

    skipped: tuple[re.Pattern[str], ...] = ()
    computed: tuple[re.Pattern[str], ...] = ()
    tied: tuple[tuple[re.Pattern[str], str], ...] = field(default=())

    def may_lack(self, name: str) -> bool:
        """Whether a file may be without a tensor."""
        return any(pattern.search(name) for pattern in (*self.skipped, *self.computed))

    def tied_to(self, name: str) -> str | None:
        """The tensor that one is tied to."""
        for pattern, other in self.tied:
            result = pattern.match(name)
            if result:
                return other + name[result.end() :]
        return None


def class_rules(config: Mapping[str, Any]) -> ClassRules:
    """The rules of a config's first architecture; empty where transformers does not know it."""
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    return _rules(name) if isinstance(name, str) and _NAME.fullmatch(name) else ClassRules()


@lru_cache(maxsize=64)
def _rules(name: str) -> ClassRules:
    try:
        import transformers

        result = getattr(transformers, name, None)
    except (ImportError, OSError, AttributeError, RuntimeError):
        return ClassRules()  # a class whose own requirements are not installed
    if not isinstance(result, type):
        return ClassRules()
    tied = getattr(result, "_tied_weights_keys", None)
    pairs = tied.items() if isinstance(tied, dict) else ()  # before version 5 a list, without whose
    return ClassRules(
        _patterns(getattr(result, "_keys_to_ignore_on_load_unexpected", None)),
        _patterns(getattr(result, "_keys_to_ignore_on_load_missing", None)),
        tuple((re.compile(key), other) for key, other in pairs if isinstance(other, str)),
    )


def _patterns(listed: Any) -> tuple[re.Pattern[str], ...]:
    words: Iterable[str] = sorted(listed) if isinstance(listed, set) else (listed or ())
    return tuple(re.compile(word) for word in words)


def model_shapes(shapes: Shapes, source: Source) -> Shapes:
    """Those of the model itself, without the parts in other folders (see `components`)."""
    parts = tuple(f"{folder}/" for folder in source.stems if folder)
    if not parts:
        return shapes
    return {name: shape for name, shape in shapes.items() if not name.startswith(parts)}


_built: dict[tuple[str, frozenset[tuple[str, tuple[int, ...]]], bool], Skeleton] = {}


def remembered(config: Mapping[str, object], shapes: Shapes, kinds: bool) -> Skeleton:
    """As `build`; the last few are remembered, since searches plan one structure many times."""
    key = json.dumps(config, sort_keys=True), frozenset(shapes.items()), kinds
    if key not in _built:
        while len(_built) > 7:
            del _built[next(iter(_built))]
        _built[key] = build(config, shapes, kinds=kinds)
        gc.collect(0)  # a model refers to itself, and `make_plan` searches for no cycles
    return _built[key]


def skeleton_of(source: Source, kinds: bool = False) -> Skeleton | None:
    """A source as its class opens it; None where that is not known."""
    try:
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        return remembered(source.config, model_shapes(shapes, source), kinds)
    except UnknownClass:
        return None
