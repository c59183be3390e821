"""What a storage format is: it recognises a model, reads its weights as numbers, and writes them.

A format says what tensors are made of; nothing is read from the files before a merge begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class StorageFormat(Protocol):
    """One way to store weights in fewer bits.

    Attributes:
        name: what `out_dtype:` of a recipe calls it, where it can be written.
        codes: safetensors dtype of the stored codes.
        block: rows and columns that share a scale in what is written.
    """

    name: str
    codes: str
    block: tuple[int, int]

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        """Whether a model is stored like this, and in nothing else that is not read."""

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        """The model's tensors as numbers.

        Raises:
            CorruptFileError: scales that do not fit their weight.
        """

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
