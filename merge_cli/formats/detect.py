"""Which storage format a model has: read as numbers, or refused by name with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.formats.fp8 import FP8
from merge_cli.formats.storage_format import QUANTIZATION, DecodedModel, StorageFormat

# Formats that can be read, in the order in which they are tried. A new one is a line here.
FORMATS: tuple[StorageFormat, ...] = (FP8,)

# What to do about those that cannot.
ADVICE = {
    "gptq": "Merge the unquantised models, then quantise the result (GPTQModel).",
    "awq": "Merge the unquantised models, then quantise the result (AutoAWQ, llm-compressor).",
    "bitsandbytes": "Load it with transformers, call `dequantize()`, save it, and merge that; or "
    "merge the unquantised models and load the result with `load_in_4bit`.",
    "hqq": "Merge the unquantised models; HQQ quantises while loading.",
    "mxfp4": "Load it with Mxfp4Config(dequantize=True), save it, and merge that.",
    "gguf": "Merge the model that the GGUF file was made of, and convert the result.",
}
_ALWAYS = "Merge the unquantised models, then quantise the result."


def read_as_numbers(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
) -> DecodedModel:
    """A model's tensors as numbers; a model that is not quantised comes back as it is.

    Raises:
        CorruptFileError: scales that do not fit their weight.
    """
    for storage_format in FORMATS:
        if storage_format.detect(tensors, config):
            return storage_format.decode(tensors, config, label)
    return DecodedModel(tensors, dict(config))


def advice(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """How a model is quantised that cannot be read, and what to do; None for one that can."""
    quantization = config.get(QUANTIZATION)
    if not quantization:
        return None
    method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
    name = str(method or "quantization_config in config.json")
    return name, ADVICE.get(str(method).lower(), _ALWAYS)
