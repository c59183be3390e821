"""A model as transformers would open it: its class on the meta device, without a byte of weights.

transformers itself says which tensors are missing, unexpected or of another shape, so that what it
renames, fuses, ties or ignores on loading is taken into account. The config is data of somebody
else's: nothing in it may load code, reach the network or ask for another implementation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.layer_rules import MAX_LAYERS

Shapes = Mapping[str, tuple[int, ...]]
Kind = tuple[tuple[str, Any], ...]  # what a layer is: (module and attribute, value), sorted

# What would choose an implementation, code or weights from somewhere else.
_CHOICES = frozenset((
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "quantization_config", "fusion_config",
    "use_kernels", "kernel_config", "distributed_config", "tp_plan", "transformers_weights",
    "use_pretrained_backbone", "backbone_kwargs", "trust_remote_code", "name_or_path",
    "_name_or_path", "torch_dtype", "dtype", "device_map",
))  # fmt: skip
_MAX_SIZE = 2**31  # of any other number that a model is made with: it would be a mistake or worse
_FLOATS = ("Infinity", "-Infinity", "NaN")  # written as {"__float__": "Infinity"}
_COUNTED = ("layer", "block", "expert", "depth", "stage")
# Attributes of a module that say where it stands, or what everything inherits.
_PLACES = frozenset(("training", "layer_idx", "layer_id", "layer_index", "idx", "block_idx"))


class Unknown(Exception):
    """Why a config's model cannot be built here."""


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
        raise Unknown("its weights are quantised")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not isinstance(config.get("model_type"), str):
        raise Unknown("config.json does not say which class it is of")
    _check_sizes(config)
    import transformers

    kind = getattr(transformers, name, None) if name.isidentifier() else None
    known = transformers.CONFIG_MAPPING
    if (
        config["model_type"] not in known
        or name.startswith("Timm")
        or not hasattr(kind, "from_pretrained")
    ):
        raise Unknown(f"transformers {transformers.__version__} has no {name}")
    if getattr(kind, "config_class", None) is not known[config["model_type"]]:
        raise Unknown(f"{name} is not a class of the model_type '{config['model_type']}'")
    with _quiet_and_alone():
        try:
            made = known[config["model_type"]].from_dict(_without_choices(config))
            return _opened(kind, name, made, shapes, kinds)
        except Exception as error:
            # Whatever a model's class raises over a config or tensors that do not suit it.
            return Skeleton(name, failure=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def _opened(kind: Any, name: str, config: Any, shapes: Shapes, kinds: bool) -> Skeleton:
    import torch

    tensors = {
        key: torch.empty(shape, dtype=torch.float32, device="meta") for key, shape in shapes.items()
    }
    model, info = kind.from_pretrained(
        None, config=config, state_dict=tensors, device_map={"": "meta"}, dtype=torch.float32,
        attn_implementation="eager", output_loading_info=True, ignore_mismatched_sizes=True,
        local_files_only=True,
    )  # fmt: skip
    wrong = {entry[0]: (tuple(entry[1]), tuple(entry[2])) for entry in info["mismatched_keys"]}
    found = _kinds(model) if kinds else {}
    return Skeleton(
        name, frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), wrong, found
    )


def _kinds(model: Any) -> dict[str, tuple[Kind, ...]]:
    """Every list of modules, and what each module in it is but for where it stands."""
    from torch.nn import ModuleList

    stacks = {path: list(found) for path, found in model.named_modules()
              if isinstance(found, ModuleList)}  # fmt: skip
    listed = _listed(model.config)
    return {
        path: tuple(
            tuple(sorted([*_kind(layer), *(
                (f"config.{key}", values[i]) for key, values in listed.items()
                if len(values) == len(layers)
            )], key=repr))
            for i, layer in enumerate(layers)
        )
        for path, layers in stacks.items()
    }  # fmt: skip


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


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Hold the numbers against bounds: a model is made of them.

    Raises:
        Unknown: a number that no model has.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
        elif type(value) is int:
            counted = any(word in key for word in _COUNTED)
            if abs(value) > (MAX_LAYERS if counted and "size" not in key else _MAX_SIZE):
                raise Unknown(f"config.json says {key}: {value}")


def _without_choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy without what would choose code, weights or an implementation.

    Numbers that JSON does not have are read as transformers 5 writes them.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(one) for one in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
            return float(value["__float__"])
        return {key: walk(one) for key, one in value.items() if key not in _CHOICES}

    found: dict[str, Any] = walk(json.loads(json.dumps(dict(config))))
    return found


@contextmanager
def _quiet_and_alone() -> Iterator[None]:
    """No word on the screen, no warning, no request: whatever a class would like to fetch."""
    from huggingface_hub import constants
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
