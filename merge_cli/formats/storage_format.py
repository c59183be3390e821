"""What a storage format is: it recognises a model, reads its weights as numbers, may write them.

A format says what tensors are made of; nothing is read from the files before a merge begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor

QUANTIZATION = "quantization_config"  # the key of config.json that says how weights are quantised


@dataclass(frozen=True)
class DecodedModel:
    """A model whose weights are numbers.

    Attributes:
        tensors: by name; what was quantised is computed while it is read.
        config: config.json without the word on quantisation.
        notes: what was done, for the plan.
    """

    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config says about how weights are quantised, itself or in its text part."""
    return config.get(QUANTIZATION) or text_config(config).get(QUANTIZATION)


def quant_method(config: Mapping[str, Any]) -> str:
    """The quantisation's name in lower case; empty without one."""
    quantization = quantization_of(config)
    named = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
    return str(named).lower()


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


class WritableFormat(StorageFormat, Protocol):
    """A format that merges are written in, too.

    Attributes:
        name: what `out_dtype:` of a recipe calls it.
        codes: safetensors dtype of the stored codes.
        block: rows and columns that share a scale in what is written.
    """

    codes: str
    block: tuple[int, int]

    def encode(self, rows: Any, columns: int) -> tuple[Any, Any]:
        """One row of blocks: codes (numpy uint8 like `rows`) and scales (numpy float32).

        Args:
            rows: numpy float32 [rows, columns of the tensor].
            columns: of a block.
        """

    def settings(self, unconverted: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of a model that is written like this.

        Args:
            unconverted: modules that stay in their dtype.
        """
