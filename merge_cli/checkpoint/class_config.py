"""Which parts of an untrusted config.json may reach a class of transformers.

Nothing in a config may load code, reach the network or ask for another implementation, and no
number may be one that no model has.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from merge_cli.checkpoint.layer_config import MAX_LAYERS
from merge_cli.errors import SourceError
from merge_cli.system.libraries import unavailable

# What would choose an implementation, code or weights from somewhere else.
_CHOICES = frozenset(
    (
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "quantization_config",
        "fusion_config",
        "use_kernels",
        "kernel_config",
        "distributed_config",
        "tp_plan",
        "transformers_weights",
        "use_pretrained_backbone",
        "backbone_kwargs",
        "trust_remote_code",
        "name_or_path",
        "_name_or_path",
        "torch_dtype",
        "dtype",
        "device_map",
    )
)
_MAX_SIZE = 2**31  # of any other number that a model is made with: it would be a mistake or worse
_FLOATS = ("Infinity", "-Infinity", "NaN")  # written as {"__float__": "Infinity"}
_COUNTED = ("layer", "block", "expert", "depth", "stage")
_IMPLEMENTATIONS = frozenset(key for key in _CHOICES if "_implementation" in key)


class UnknownClass(Exception):
    """Why a config's model cannot be built here."""


def known_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that a config names, and the class of its config.

    Raises:
        UnknownClass: none is named, transformers does not have it, there is no transformers or
            torch, or a number that no model has.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not isinstance(config.get("model_type"), str):
        raise UnknownClass("config.json does not say which class it is of")
    check_sizes(config)
    # Without torch, transformers has names of classes and nothing behind them.
    if reason := unavailable("transformers", "torch"):
        raise UnknownClass(reason)
    import transformers

    kind = getattr(transformers, name, None) if name.isidentifier() else None
    classes = transformers.CONFIG_MAPPING
    if (
        config["model_type"] not in classes
        or name.startswith("Timm")
        or not hasattr(kind, "from_pretrained")
    ):
        raise UnknownClass(f"transformers {transformers.__version__} has no {name}")
    config_class = classes[config["model_type"]]
    if getattr(kind, "config_class", None) is not config_class:
        raise UnknownClass(f"{name} is not a class of the model_type '{config['model_type']}'")
    return kind, config_class


def empty_model(config: Mapping[str, Any]) -> Any:
    """A model on the meta device: names, shapes and kinds of modules.

    Raises:
        Unknown: its class is not known, or refuses the config.
    """
    kind, config_class = known_class(config)
    import torch

    with quiet_and_alone():
        try:
            with torch.device("meta"):
                return kind(config_class.from_dict(without_choices(config)))
        except Exception as error:  # a config can break a class in any way it likes
            printed = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnknownClass(printed) from error


def written_out(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config with everything that transformers takes it to mean; None where it does not say."""
    try:
        check_sizes(config)
        import transformers

        config_class = transformers.CONFIG_MAPPING[config["model_type"]]
        with quiet_and_alone():
            text = config_class.from_dict(without_choices(config)).to_json_string(use_diff=False)
        result: dict[str, Any] = json.loads(text)
    except Exception:
        # A type that this transformers lacks, or a config that it refuses in a way of its own.
        return None
    return result


def refuse_code(config: Mapping[str, Any], label: str) -> None:
    """Hold a config that transformers is about to read itself against what it would fetch or make.

    Raises:
        SourceError: it asks for an implementation from the Hub, or is of absurd size.
    """
    try:
        check_sizes(config)
    except UnknownClass as error:
        raise SourceError(str(error), model=label) from None
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _IMPLEMENTATIONS:
            refuse_code(value, label)
        elif key in _IMPLEMENTATIONS and "/" in json.dumps(value):
            message = f"config.json asks for code from the Hub ({key}: {value})"
            hint = "Nothing that a checkpoint names is executed: take the key out."
            raise SourceError(message, model=label, hint=hint)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Hold the numbers against bounds: a model is made of them.

    Raises:
        Unknown: a number that no model has.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value)
        elif type(value) is int:
            counted = any(word in key for word in _COUNTED)
            if abs(value) > (MAX_LAYERS if counted and "size" not in key else _MAX_SIZE):
                raise UnknownClass(f"config.json says {key}: {value}")


def without_choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy without what would choose code, weights or an implementation.

    Numbers that JSON does not have are read as transformers 5 writes them.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
            return float(value["__float__"])
        return {key: walk(item) for key, item in value.items() if key not in _CHOICES}

    result: dict[str, Any] = walk(json.loads(json.dumps(dict(config))))
    return result


@contextmanager
def quiet_and_alone() -> Iterator[None]:
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
