"""A model as transformers would open it: its class on the meta device, without a byte of weights.

transformers itself says which tensors are missing, unexpected or of another shape, so that what it
renames, fuses, ties or ignores on loading is taken into account. The config is data of somebody
else's: what of it a class may be made from is said in checkpoint/class_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.class_config import (
    UnknownClass,
    known_class,
    quiet_and_alone,
    without_choices,
)

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
    kind, about = known_class(config)
    with quiet_and_alone():
        try:
            made = about.from_dict(without_choices(config))
            return _opened(kind, kind.__name__, made, shapes, kinds)
        except Exception as error:
            # Whatever a model's class raises over a config or tensors that do not suit it.
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return Skeleton(kind.__name__, failure=said)


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
    found = _kinds(model) if kinds else {}
    return Skeleton(
        name, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), wrong, found
    )


def _kinds(model: Any) -> dict[str, tuple[Kind, ...]]:
    """Every list of modules, and what each module in it is but for where it stands."""
    from torch.nn import ModuleList

    stacks = {
        path: list(found) for path, found in model.named_modules() if isinstance(found, ModuleList)
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
    found: dict[str, list[Any]] = {}
    for key in {*vars(part), "layer_types", "layers_block_type", "mlp_layer_types"}:
        value = getattr(part, key, None)
        if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
            continue
        # Numbers of layers are no property of the layer that stands at their place.
        if not all(type(one) is int for one in value) or set(value) <= {0, 1}:
            found[key] = value
    return found
