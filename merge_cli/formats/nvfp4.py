"""NVFP4 as ModelOpt writes it: E2M1 codes, an E4M3 scale for 16 of them, and one for the tensor.

`weight` (U8 [rows, columns / 2]), `weight_scale` (E4M3 [rows, columns / 16]), `weight_scale_2`
(float32). compressed-tensors has the same numbers with other names, and the reciprocal of the last
(formats/compressed_tensors.py).

NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.fp4_encoding import GROUP, CompressedNvfp4Encoding
from merge_cli.formats.fp8 import FP8_CODES, dequantised
from merge_cli.formats.grouped_fp4 import fp4_weight
from merge_cli.formats.storage_format import (
    DecodedModel,
    dtypes_of,
    quant_method,
    quantization_of,
    unquantised,
    usual_dtype,
)
from merge_cli.formats.stored_parts import drop_activations, reject_leftovers, required

_SECOND = "_scale_2"  # behind the weight's name
_METHODS = ("", "modelopt", "modelopt_fp4", "modelopt_mixed")  # no word: in hf_quant_config.json


class Nvfp4:
    """The format. See `StorageFormat`."""

    name = "NVFP4"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return (
            quant_method(config) in _METHODS
            and "U8" in dtypes_of(tensors)
            and any(ref.dtype == "U8" and n + _SECOND in tensors for n, ref in tensors.items())
        )

    def encoding(self, word: str, dtype: str, config: Mapping[str, Any]) -> Encoding | None:
        return CompressedNvfp4Encoding() if word == "nvfp4" else None

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        default_dtype, quantization = usual_dtype(config), quantization_of(config)
        as_numbers: dict[str, Tensor] = dict(tensors)
        count = 0
        for name, ref in tensors.items():
            if ref.dtype in FP8_CODES and not name.endswith("_scale"):
                weight = dequantised(ref, tensors, quantization, default_dtype, label)
                if weight.scale is not None:
                    del as_numbers[weight.scale.name]
                as_numbers[name] = weight
            if ref.dtype != "U8" or name + _SECOND not in tensors:
                continue
            scales, second = required(tensors, f"{name}_scale", ref), tensors[name + _SECOND]
            as_numbers[name] = fp4_weight(name, ref, scales, default_dtype, GROUP, second)
            del as_numbers[scales.name], as_numbers[second.name]
            count += 1
        notes = drop_activations(as_numbers)
        reject_leftovers(as_numbers.values(), (_SECOND,))
        notes.insert(0, f"{count} NVFP4 weights are read as numbers")
        return DecodedModel(as_numbers, unquantised(config), tuple(notes))


NVFP4 = Nvfp4()
