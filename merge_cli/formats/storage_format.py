"""What a storage format is: it recognises a model, reads its weights as numbers, may write them.

A format says what tensors are made of; nothing is read from the files before a merge begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor, columns_of
from merge_cli.formats.encoding import Encoding

QUANTIZATION = "quantization_config"  # the key of config.json that says how weights are quantised
_OTHER_KEYS = ("quantization",)  # MLX's


@dataclass(frozen=True)
class DecodedModel:
    """A model whose weights are numbers.

    Attributes:
        tensors: by name; what was quantised is computed while it is read.
        config: config.json without the word on quantisation.
        notes: what was done, for the plan.
        quantization: config.json with the word on quantisation, as it is stored; empty for a model
            that is not quantised.
        left_out: stored tensors that no weight is computed from.
    """

    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[TensorRef, ...] = ()


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config says about how weights are quantised, itself or in its text part."""
    return config.get(QUANTIZATION) or text_config(config).get(QUANTIZATION)


def says_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a config has any word on quantisation, itself or in its text part."""
    parts = (config, text_config(config))
    return any(part.get(key) for part in parts for key in (QUANTIZATION, *_OTHER_KEYS))


def quant_method(config: Mapping[str, Any]) -> str:
    """The quantisation's name in lower case; empty without one."""
    quantization = quantization_of(config)
    named = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
    return str(named).lower()


def dtypes_of(tensors: Mapping[str, TensorRef]) -> set[str]:
    """The dtypes that a model's files hold."""
    columns = columns_of(tensors)
    return {*(columns.dtypes if columns else map(attrgetter("dtype"), tensors.values()))}


def unquantised(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A config without its words on quantisation.

    Args:
        keys: those that say so beside `quantization_config`.
    """
    gone = (QUANTIZATION, *keys)
    plain = {key: value for key, value in config.items() if key not in gone}
    for key, part in plain.items():
        if part is text_config(config):
            plain[key] = {inner: value for inner, value in part.items() if inner not in gone}
    return plain


def quantised_as(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the words on quantisation that another one has and `unquantised` takes away.

    Args:
        stored: the config of a quantised model.
    """
    plain = unquantised(stored, *_OTHER_KEYS)
    result = {**config, **{key: stored[key] for key in stored if key not in plain}}
    for key, part in stored.items():
        if part is text_config(stored) and part is not stored and isinstance(result.get(key), dict):
            words = {inner: part[inner] for inner in part if inner not in plain[key]}
            result[key] = {**result[key], **words}
    return result


def usual_dtype(config: Mapping[str, Any]) -> str:
    """What a model's weights would be stored in without quantisation: safetensors' name."""
    parts = (config, text_config(config))
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    first = next((str(name) for name in named if name), "")
    return {"float16": "F16", "float32": "F32"}.get(first.removeprefix("torch."), "BF16")


class StorageFormat(Protocol):
    """One way to store weights in fewer bits, which can be read.

    Attributes:
        name: what messages call it.
    """

    @property
    def name(self) -> str: ...

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        """Whether a model is stored like this, as its headers and its config say."""

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        """The model's tensors as numbers.

        Raises:
            CorruptFileError: scales that do not fit their weight, or that are not there.
            SourceError: a variant of the format that is not read.
        """


@runtime_checkable
class WritableFormat(Protocol):
    """A format that `out_dtype:` has a word for, whatever the model is stored in."""

    def encoding(self, word: str, dtype: str, config: Mapping[str, Any]) -> Encoding | None:
        """How weights are stored for a word of `out_dtype:`; None for another format's word.

        Args:
            dtype: safetensors' name of what they would be stored in without it.
            config: of the model.
        """
