"""fp8 weights with their scales: recognised, dequantised while they are read, and written.

Scales as DeepSeek, Qwen and transformers write them (`weight_scale_inv`, blocks of 128 x 128), and
as compressed-tensors, FBGEMM and ModelOpt do (`weight_scale`: of the tensor, a row, or a block),
and ComfyUI (`scale_weight`, of the tensor). How it is written is in formats/fp8_encoding.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor
from merge_cli.errors import CorruptFileError
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.fp8_encoding import CompressedFp8Encoding, Fp8Encoding
from merge_cli.formats.schemes import FLOATS, scheme_weights
from merge_cli.formats.small_floats import numbers_of, read_scales
from merge_cli.formats.storage_format import (
    DecodedModel,
    dtypes_of,
    quantization_of,
    unquantised,
    usual_dtype,
)
from merge_cli.formats.stored_parts import drop_activations, reject_leftovers
from merge_cli.kernels.codes import look_up, scale_groups

FP8_CODES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # behind the weight's name
_SCALE_DTYPES = (*FLOATS, "F8_E8M0", "U8")
_TALLEST = 128  # rows of a block: they are held as numbers while they are written
_MARK = "scaled_fp8"  # a tensor of no use with which ComfyUI marks a file


class Fp8:
    """The format. See `StorageFormat`."""

    name = "fp8"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        stored = not dtypes_of(tensors).isdisjoint(FP8_CODES)
        return stored and _is_fp8(quantization_of(config))

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        stored = [ref for ref in tensors.values() if ref.dtype in FP8_CODES]
        default_dtype, quantization = usual_dtype(config), quantization_of(config)
        as_numbers: dict[str, Tensor] = dict(tensors)
        scaled = 0
        as_numbers.pop(_MARK, None)
        stored = [ref for ref in stored if ref.name != _MARK]
        for ref in stored:
            weight = dequantised(ref, tensors, quantization, default_dtype, label)
            if weight.scale is not None:
                del as_numbers[weight.scale.name]
                scaled += 1
            as_numbers[ref.name] = weight
        note = f"{len(stored)} fp8 weights are read as numbers, {scaled} of them with scales"
        notes = (note, *drop_activations(as_numbers))
        reject_leftovers(as_numbers.values(), ("_scale_inv", ".scale_weight"))
        return DecodedModel(as_numbers, unquantised(config), notes)

    def encoding(self, word: str, dtype: str, config: Mapping[str, Any]) -> Encoding | None:
        if word == self.name:
            return Fp8Encoding(128, 128)
        if word not in ("fp8_row", "fp8_tensor"):
            return None
        scales = dtype if dtype in FLOATS else "F32"
        row = word == "fp8_row"
        return CompressedFp8Encoding(int(row), 0, "_scale", scales, () if row else (1,))


FP8 = Fp8()


@dataclass(frozen=True)
class DequantizedTensor(Float32):
    """`weight` times `scale`, in float32. See `tensors.Tensor`.

    Attributes:
        scale: one number, one for each row, or one for each block of rows and columns; of stacked
            matrices for each of them. None where there is none.
        block: rows and columns of a block.
        default_dtype: what the model's weights would be without quantisation.
        powers: scales are powers of two.
    """

    weight: TensorRef
    scale: TensorRef | None
    block: tuple[int, int]
    default_dtype: str = "BF16"
    powers: bool = False

    @property
    def made_of(self) -> Tensor:
        return self.weight

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.weight, self.scale) if self.scale else (self.weight,)

    @property
    def formula(self) -> str:
        return f"{self.weight.dtype} times its scales by blocks of {self.block}"

    @property
    def encoding(self) -> Encoding | str:
        if self.scale is None:
            return Fp8Encoding(0, 0, "", codes=self.weight.dtype)
        suffix = self.scale.name.removeprefix(self.weight.name)
        if suffix == self.scale.name:
            suffix = suffix.removeprefix(self.weight.name.removesuffix(".weight"))
        exponents = self.scale.dtype in ("F8_E8M0", "U8")
        form: dict[str, Any] = {
            "suffix": suffix,
            "dtype": self.scale.dtype,
            "powers": self.powers or exponents,
            "codes": self.weight.dtype,
        }
        if self.scale.dtype not in _SCALE_DTYPES:
            return f"fp8 with scales in {self.scale.dtype} is not written"
        if self.scale.size == 1:
            return Fp8Encoding(0, 0, scalar=self.scale.shape, **form)
        tall, wide = self.block
        whole_rows = wide == self.shape[-1]
        if tall > _TALLEST or (whole_rows and self.scale.shape[-1:] != (1,)):
            return f"fp8 with scales of shape {list(self.scale.shape)} is not written"
        encoding = Fp8Encoding(tall, 0 if whole_rows else wide, **form)
        return encoding.unfit(self.shape) or encoding

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        raw = np.empty(len(out), np.uint8)
        read(self.weight, start, raw.data)
        look_up(numbers_of(self.weight.dtype), raw, out)
        if self.scale is None:
            return
        if self.scale.size == 1:
            out *= read_scales(read, self.scale, 0, 1)[0]
            return
        columns = self.shape[-1]
        stop = start + len(out)
        for low, high, scales in self._scaled_rows(read, start // columns, -(-stop // columns)):
            begin, end = max(start, low * columns), min(stop, high * columns)
            part = out[begin - start : end - start]
            # The ends may be parts of rows; what lies between are whole ones.
            head = min(-begin % columns, len(part))
            whole = (len(part) - head) // columns
            tail = len(part) - head - whole * columns
            if head:
                first = (begin - low * columns) % columns
                part[:head] *= self._across(scales[0], columns)[first : first + head]
            rows = part[head : head + whole * columns].reshape(whole, columns)
            scales = scales[1 if head else 0 :]
            if scales.shape[1] * self.block[1] == columns or scales.shape[1] == 1:
                scale_groups(rows, scales[:whole])
            else:
                rows *= self._across(scales[:whole], columns)
            if tail:
                part[len(part) - tail :] *= self._across(scales[whole], columns)[:tail]

    def _across(self, scales: Any, columns: int) -> Any:
        """Scales of blocks [..., blocks] as those of columns [..., columns]."""
        import numpy as np

        if scales.shape[-1] == 1:
            return np.broadcast_to(scales, (*scales.shape[:-1], columns))
        return np.repeat(scales, self.block[1], axis=-1)[..., :columns]

    def _scaled_rows(self, read: Read, first: int, last: int) -> Iterator[tuple[int, int, Any]]:
        """Rows of one matrix after the other: from, to, and their scales [rows, blocks]."""
        import numpy as np

        assert self.scale is not None
        tall = self.block[0]
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        per_matrix = -(-rows // tall)
        across = self.scale.size * rows // (per_matrix * (self.size // self.shape[-1]))
        for matrix in range(first // rows, -(-last // rows)):
            low, high = max(first, matrix * rows), min(last, (matrix + 1) * rows)
            top, bottom = (low - matrix * rows) // tall, -(-(high - matrix * rows) // tall)
            at = (matrix * per_matrix + top) * across
            numbers = read_scales(read, self.scale, at, (bottom - top) * across)
            every = np.repeat(numbers.reshape(-1, across), tall, axis=0)
            skipped = low - matrix * rows - top * tall
            yield low, high, every[skipped : skipped + high - low]


def dequantised(
    ref: TensorRef,
    tensors: Mapping[str, TensorRef],
    quantization: Any,
    default_dtype: str,
    label: str,
) -> DequantizedTensor:
    """A weight in fp8 with its scale, if it has one.

    Args:
        quantization: what the config says of it.

    Raises:
        CorruptFileError: a scale that does not fit.
    """
    names = [ref.name + end for end in _SCALES]
    if ref.name.endswith(".weight"):
        names.append(f"{ref.name.removesuffix('weight')}scale_weight")
    scale = next((tensors[name] for name in names if name in tensors), None)
    powers = isinstance(quantization, dict) and quantization.get("scale_fmt") == "ue8m0"
    block = _block(ref, scale, quantization, label)
    return DequantizedTensor(ref, scale, block, default_dtype, powers)


def _is_fp8(quantization: Any) -> bool:
    """Whether what a config says of its quantisation is fp8 and nothing else."""
    if not isinstance(quantization, dict):
        return quantization is None
    method = str(quantization.get("quant_method", "")).lower()
    if method in ("fp8", "fbgemm_fp8"):
        return bool(quantization.get("expert_dtype", "fp8") == "fp8")
    if method == "modelopt":
        return "FP8" in str(quantization.get("quant_algo", quantization))
    if method == "compressed-tensors":
        return all(
            weights.get("num_bits") == 8 and weights.get("type") == "float"
            for weights in scheme_weights(quantization)
        )
    return False


def _block(
    ref: TensorRef, scale: TensorRef | None, quantization: Any, label: str
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = ref.shape[-2:] if len(ref.shape) > 1 else (1, *(ref.shape or (1,)))
    if scale is None or scale.size == 1:
        return rows, columns
    grid = scale.shape[-2:] if len(scale.shape) > 1 else (scale.shape[0], 1)
    if not scale.size:
        grid = (rows + 1, columns + 1)  # which fits nothing
    stacked = ref.size // max(1, rows * columns)
    declared = _declared_block(quantization)
    # Without a word on it, blocks divide the weight evenly; a scale for each row always may be.
    even = rows % grid[0] == 0 and columns % grid[1] == 0
    derived = (rows // grid[0], columns // grid[1]) if even else None
    for block in (declared, derived):
        fits = block and (-(-rows // block[0]), -(-columns // block[1])) == tuple(grid)
        if block and fits and scale.size == stacked * grid[0] * grid[1]:
            return block
    message = f"scales of shape {list(scale.shape)} do not fit a weight of shape {list(ref.shape)}"
    raise CorruptFileError(message, model=label, file=scale.path.name, tensor=scale.name)


def _declared_block(quantization: Any) -> tuple[int, int] | None:
    """What the config says, if it does."""
    if not isinstance(quantization, dict):
        return None
    shapes = [
        quantization.get("weight_block_size"),
        *(k.get("block_structure") for k in scheme_weights(quantization)),
    ]
    for size in shapes:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n for n in size):
            return size[0], size[1]
    return None
