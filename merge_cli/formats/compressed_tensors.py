"""compressed-tensors (llm-compressor, vLLM; Kimi K2): integers, NVFP4, MXFP4 and fp8, also mixed.

    pack-quantized        `weight_packed` (I32, codes of 4 or 8 bits by rows), `weight_scale`,
                          `weight_shape`, perhaps `weight_zero_point` (packed by columns) and
                          `weight_g_idx` (the group of each column)
    int-quantized         `weight` (I8), `weight_scale`, perhaps `weight_zero_point`
    nvfp4-pack-quantized  `weight_packed` (U8), `weight_scale` (E4M3), `weight_global_scale`
    mxfp4-pack-quantized  `weight_packed` (U8), `weight_scale` (U8, exponents)
    float-quantized       formats/fp8.py, which also reads a model that has nothing else

What a module is stored as follows from its tensors; the config's groups say how many bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import SourceError
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.fp8 import FP8_CODES, dequantised
from merge_cli.formats.grouped_fp4 import fp4_weight
from merge_cli.formats.grouped_integers import GroupedIntegers, check_shape
from merge_cli.formats.int4_encoding import Int4Encoding
from merge_cli.formats.schemes import FLOATS, METHOD, scheme_weights
from merge_cli.formats.storage_format import (
    DecodedModel,
    quant_method,
    quantization_of,
    unquantised,
    usual_dtype,
)
from merge_cli.formats.stored_parts import (
    corrupt,
    drop_activations,
    of_shape,
    reject_leftovers,
    required,
    small_numbers,
)

_PACKED = "_packed"
_PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx", "_global_scale")
_BITS = (4, 8)  # others have been packed in two ways, which look alike


class CompressedTensors:
    """The format. See `StorageFormat`."""

    name = METHOD

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return quant_method(config) == METHOD and any(
            name.endswith(".weight_packed") or ref.dtype == "I8" for name, ref in tensors.items()
        )

    def encoding(self, word: str, dtype: str, config: Mapping[str, Any]) -> Encoding | None:
        return Int4Encoding(dtype=dtype if dtype in FLOATS else "F32") if word == "int4" else None

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        quantization, default_dtype = quantization_of(config), usual_dtype(config)
        _reject_sparse(quantization, label)
        schemes = list(_schemes(quantization))
        as_numbers: dict[str, Tensor] = dict(tensors)
        kinds: dict[str, int] = {}
        for name, ref in tensors.items():
            weight = name.removesuffix(_PACKED)
            parts = {end: tensors[weight + end] for end in _PARTS if weight + end in tensors}
            made: Tensor
            if ref.dtype == "I8" and f"{name}_scale" in tensors:
                kind, made = "int8", integer_weight(name, ref, parts, default_dtype, [])
            elif ref.dtype in FP8_CODES and f"{name}_scale" in tensors:
                kind, made = "fp8", dequantised(ref, tensors, quantization, default_dtype, label)
            elif name == weight or not name.endswith(".weight_packed"):
                continue
            elif ref.dtype == "U8":
                scales, second = (
                    required(tensors, f"{weight}_scale", ref),
                    parts.get("_global_scale"),
                )
                kind, group = ("NVFP4", 16) if second else ("MXFP4", 32)
                made = fp4_weight(weight, ref, scales, default_dtype, group, second, divides=True)
            else:
                integers = integer_weight(weight, ref, parts, default_dtype, schemes)
                kind, made = f"{integers.bits}-bit integer", integers
            if name != weight and weight in tensors:
                raise corrupt(f"is stored a second time, as '{weight}'", ref)
            for part in (*parts.values(), ref):
                as_numbers.pop(part.name, None)
            as_numbers[weight] = made
            kinds[kind] = kinds.get(kind, 0) + 1
        dropped = drop_activations(as_numbers)
        endings = tuple(f".weight{end}" for end in _PARTS)
        reject_leftovers(as_numbers.values(), endings)
        notes = [f"{count} {kind} weights are read as numbers" for kind, count in kinds.items()]
        return DecodedModel(as_numbers, unquantised(config), (*notes, *dropped))


COMPRESSED_TENSORS = CompressedTensors()


def integer_weight(
    name: str,
    codes: TensorRef,
    parts: Mapping[str, TensorRef],
    default_dtype: str,
    schemes: list[Mapping[str, Any]],
) -> GroupedIntegers:
    """A weight of integers, its parts checked against one another.

    Args:
        codes: I32 for packed ones, I8 for plain ones.
        parts: by what their names end with.
        schemes: of the config, where the codes are packed.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
    """
    if "_scale" not in parts:
        raise corrupt(f"cannot be read without '{name}_scale', which is not there", codes)
    scales, zeros, groups = parts["_scale"], parts.get("_zero_point"), parts.get("_g_idx")
    checked = parts.get("_shape")
    if codes.dtype not in ("I32", "I8") or len(codes.shape) < 2 or not codes.size:
        message = f"{codes.dtype} of shape {list(codes.shape)}: packed integers are I32 of"
        raise corrupt(f"{message} [..., rows, columns * bits / 32]", codes)
    if not scales.size:
        raise corrupt(f"no scales: {list(scales.shape)}", scales)
    across = 1 if scales.size == 1 else scales.shape[-1]
    bits, columns, group = 8, codes.shape[-1], 0
    if codes.dtype == "I32":
        checked = checked or required({}, f"{name}_shape", codes)
        scheme, bits, columns = _width(codes, across, checked, schemes)
        _check_scheme(codes, scheme, zeros, groups)
        group = (scheme.get("group_size") or 0) if scheme.get("strategy") != "channel" else 0
    rows = codes.shape[:-1]
    shape = (*rows, columns)
    why = f"'{codes.name}'"
    grid = (*rows, across)
    of_shape(scales, FLOATS, grid, *(((), (1,)) if across == 1 else ()), why=why)
    if columns % across and groups is None:
        raise corrupt(f"{across} groups do not divide {columns} columns", scales)
    if zeros is not None and codes.dtype == "I8":
        of_shape(zeros, ("I8",), grid, *(((), (1,)) if across == 1 else ()), why=why)
    elif zeros is not None:
        packed = (*rows[:-1], -(-rows[-1] * bits // 32), across)
        if zeros.dtype != "I8" or zeros.shape != grid:
            of_shape(zeros, ("I32",), packed, why=why)
    if groups is not None:
        of_shape(groups, ("I32", "I64"), (columns,), why=why)
    return GroupedIntegers(
        name, codes, shape, default_dtype, bits, scales, zeros, groups, checked, max(0, group)
    )


def _width(
    codes: TensorRef, across: int, checked: TensorRef, schemes: list[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], int, int]:
    """The scheme, bits of a code, and columns: as `weight_shape` says, or as groups make them."""
    stated = small_numbers(checked)
    if stated is not None and (len(stated) < 2 or any(number < 1 for number in stated)):
        raise corrupt(f"{stated} is no shape of a matrix", checked)
    for scheme in schemes:
        bits, size = scheme.get("num_bits"), scheme.get("group_size")
        if type(bits) is not int or bits not in _BITS:
            message = f"integers of {bits} bits are not read: of {_BITS[0]} and {_BITS[1]} are"
            raise SourceError(message, model=codes.model, file="config.json")
        if size is not None and (type(size) is not int or (size < 1 and size != -1)):
            message = f"a group_size of {size!r}, which is no number of columns"
            raise SourceError(message, model=codes.model, file="config.json")
        grouped = across > 1 or scheme.get("strategy") == "group"
        if grouped and size in (None, -1):
            continue  # of other weights
        derived = across * size if grouped and size else codes.shape[-1] * 32 // bits
        columns = derived if stated is None else stated[-1]
        if grouped and columns != derived:
            continue
        if -(-columns * bits // 32) == codes.shape[-1]:
            if stated is not None:
                check_shape(checked, stated, (*codes.shape[:-1], columns))
            return scheme, bits, columns
    message = f"I32 of shape {list(codes.shape)} with {across} groups"
    raise corrupt(f"{message} fits no group of the config, with the shape {stated}", codes)


def _check_scheme(
    codes: TensorRef,
    scheme: Mapping[str, Any],
    zeros: TensorRef | None,
    groups: TensorRef | None,
) -> None:
    """What the config says a weight has must be there."""
    if scheme.get("symmetric", True) is False and zeros is None:
        raise corrupt("is not symmetric, as the config says, and has no weight_zero_point", codes)
    if str(scheme.get("actorder")).lower() in ("group", "true", "dynamic") and groups is None:
        raise corrupt("has its columns in another order (actorder) and no weight_g_idx", codes)


def _schemes(quantization: Any) -> Iterator[Mapping[str, Any]]:
    """What the config's groups say of weights that are integers."""
    yield from (
        weights for weights in scheme_weights(quantization) if weights.get("type", "int") == "int"
    )


def _reject_sparse(quantization: Any, label: str) -> None:
    """What changes the meaning of weights and is not read."""
    if not isinstance(quantization, dict):
        return
    sparsity = quantization.get("sparsity_config") or {}
    kind = str(quantization.get("format", ""))
    sparse = str(sparsity.get("format", "dense")) if isinstance(sparsity, dict) else str(sparsity)
    for name in (sparse, kind):
        if "sparse" in name or "marlin" in name:
            raise SourceError(
                f"compressed-tensors of the format '{name}' are not read", model=label
            )
    if quantization.get("transform_config"):
        message = "its weights have been rotated (transform_config), which is not undone"
        raise SourceError(message, model=label, file="config.json")
