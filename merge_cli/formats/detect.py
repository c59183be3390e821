"""Which storage format a model has: read as numbers, or refused by name with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.storage_format import (
    DecodedModel,
    WritableFormat,
    dtypes_of,
    quant_method,
    quantization_of,
    says_quantised,
)
from merge_cli.formats.stored_parts import reject_codes

_FLOATS = {"F64", "F32", "F16", "BF16"}
# What to do about those that cannot.
ADVICE = {
    "gguf": "Merge the model that the GGUF file was made of, and convert the result.",
}
_ALWAYS = "Merge the unquantised models, then quantise the result."


def read_as_numbers(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
) -> DecodedModel:
    """A model's tensors as numbers; a model that is not quantised comes back as it is.

    Raises:
        CorruptFileError: scales that do not fit their weight, or that are not there.
        SourceError: a variant of a format that is not read, or codes that the config does not name.
    """
    # Codes are integers or fp8: most models have none, and then no format is loaded.
    if dtypes_of(tensors) <= _FLOATS and not says_quantised(config):
        return DecodedModel(tensors, dict(config))
    from merge_cli.formats.registry import FORMATS

    for storage_format in FORMATS:
        if storage_format.detect(tensors, config):
            decoded = storage_format.decode(tensors, config, label)
            read = {ref.name for tensor in decoded.tensors.values() for ref in tensor.stored}
            left_out = tuple(ref for name, ref in tensors.items() if name not in read)
            return replace(decoded, quantization=config, left_out=left_out)
    if not quantization_of(config):  # one that is named and not read is refused with its name
        reject_codes(tensors, label)
    return DecodedModel(tensors, dict(config))


def encoding_for(word: str, dtype: str, config: Mapping[str, Any]) -> Encoding:
    """How weights are stored for a word of `out_dtype:`; see `WritableFormat`."""
    from merge_cli.formats.registry import FORMATS

    offered = (
        storage_format.encoding(word, dtype, config)
        for storage_format in FORMATS
        if isinstance(storage_format, WritableFormat)
    )
    return next(encoding for encoding in offered if encoding is not None)


def advice(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """How a model is quantised that cannot be read, and what to do; None for one that can."""
    if not quantization_of(config):
        return None
    method = quant_method(config)
    return method or "quantization_config in config.json", ADVICE.get(method, _ALWAYS)
