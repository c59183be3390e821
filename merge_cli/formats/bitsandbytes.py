"""bitsandbytes: nf4 and fp4 with absolute maxima, perhaps nested, and int8 by rows.

    4 bits  `NAME` (two codes in a byte, the higher four bits first, whatever dtype they are kept
            in), `NAME.quant_map` (the number of each code), `NAME.absmax` (of each block of
            numbers, which follow one another through the rows), and with shape and block size
            a JSON text, `NAME.quant_state.bitsandbytes__nf4` or `...__fp4`. Nested, `absmax` are
            codes themselves: of `nested_quant_map` and `nested_absmax`, and an offset is added.
    int8    `NAME` (I8), and for each row 127 times its scale in `SCB`.

Dettmers et al., arXiv:2305.14314 (nf4, nested) and arXiv:2208.07339 (int8).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor, read_numbers
from merge_cli.formats.grouped_integers import reject_conv1d
from merge_cli.formats.packed import PackedRows, PackedTensor
from merge_cli.formats.storage_format import (
    DecodedModel,
    quant_method,
    unquantised,
    usual_dtype,
)
from merge_cli.formats.stored_parts import (
    as_bytes,
    corrupt,
    not_here,
    of_shape,
    read_integers,
    reject_leftovers,
    required,
    small_bytes,
)
from merge_cli.kernels.codes import look_up, scale_groups

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")

_ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")


class BitsAndBytes:
    """The format. See `StorageFormat`."""

    name = "bitsandbytes"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return quant_method(config).startswith("bitsandbytes") and any(
            _STATE in name or name.endswith(".SCB") for name in tensors
        )

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        default_dtype = usual_dtype(config)
        reject_conv1d(config, label, self.name)
        as_numbers: dict[str, Tensor] = dict(tensors)
        counts = dict.fromkeys((*_KINDS, "int8"), 0)
        for name, ref in tensors.items():
            made: FourBits | EightBits
            if _STATE in name:
                weight, _, kind = name.partition(_STATE)
                made = _four_bits(weight, ref, kind, tensors, default_dtype)
            elif name.endswith(".SCB"):
                weight, kind = f"{name.removesuffix('.SCB')}.weight", "int8"
                made = _eight_bits(weight, ref, tensors, default_dtype)
            else:
                continue
            for part in made.stored:
                as_numbers.pop(part.name, None)
            as_numbers[weight] = made
            counts[kind] += 1
        reject_leftovers(as_numbers.values(), _ENDINGS)
        notes = [
            f"{count} {kind} weights of bitsandbytes are read as numbers; they are lossy"
            for kind, count in counts.items()
            if count
        ]
        return DecodedModel(as_numbers, unquantised(config), tuple(notes))


BITSANDBYTES = BitsAndBytes()


@dataclass(frozen=True)
class FourBits(PackedTensor):
    """Numbers of a table of sixteen, times the absolute maximum of their block.

    Attributes:
        numbers: of each code.
        block: numbers that share a maximum.
        maxima: float32, or codes of `nested_numbers`.
        nested_block, offset: of the maxima.
        state: the JSON text.
    """

    numbers: TensorRef
    block: int
    maxima: TensorRef
    state: TensorRef
    nested_numbers: TensorRef | None = None
    nested_maxima: TensorRef | None = None
    nested_block: int = 1
    offset: float = 0.0

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        nested = (self.nested_numbers, self.nested_maxima)
        extra = (ref for ref in nested if ref is not None)
        return (self.codes, self.numbers, self.maxima, self.state, *extra)

    @property
    def formula(self) -> str:
        nested = f"nested {self.nested_block} {self.offset!r}" if self.nested_numbers else ""
        return f"four bits in blocks of {self.block} {nested}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        stop = start + len(out)
        first, last = start // self.block, -(-stop // self.block)
        begin, whole = start - first * self.block, (last - first) * self.block
        # Whole blocks are decoded where they are wanted, others beside it.
        fits = len(out) == whole and out.ctypes.data % 8 == 0
        numbers = out if fits else np.zeros(whole, np.float32)
        raw = np.empty(min(whole, self.size - first * self.block + 1) // 2, np.uint8)
        read(as_bytes(self.codes), first * self.block // 2, raw.data)
        single = read_numbers(read, self.numbers, 0, 16)
        codes = np.arange(256)
        pairs = np.stack([single[codes >> 4], single[codes & 15]], axis=1).view(np.uint64)
        look_up(pairs.reshape(-1), raw, numbers[: 2 * len(raw)].view(np.uint64))
        scale_groups(numbers[None], self._maxima(read, first, last)[None])
        if numbers is not out:
            out[:] = numbers[begin : begin + len(out)]

    def _maxima(self, read: Read, first: int, last: int) -> Any:
        """The absolute maxima of blocks [first, last): float32."""
        import numpy as np

        if self.nested_numbers is None or self.nested_maxima is None:
            return read_numbers(read, self.maxima, first, last - first)
        codes = read_integers(read, self.maxima, first, last - first)
        maxima = read_numbers(read, self.nested_numbers, 0, 256)[codes]
        low, high = first // self.nested_block, -(-last // self.nested_block)
        outer = read_numbers(read, self.nested_maxima, low, high - low)
        maxima *= outer[np.arange(first, last) // self.nested_block - low]
        maxima += np.float32(self.offset)
        return maxima


@dataclass(frozen=True)
class EightBits(PackedRows):
    """Plain int8, times the maximum of the row over 127.

    Attributes:
        maxima: of rows.
        layout: how the codes lie; 0 means by rows. None where nothing says so.
    """

    maxima: TensorRef
    layout: TensorRef | None

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        extra = (self.layout,) if self.layout is not None else ()
        return (self.codes, self.maxima, *extra)

    @property
    def formula(self) -> str:
        return "int8 by rows, over 127"

    def rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        if self.layout is not None:
            _check_layout(self.layout, read_integers(read, self.layout, 0, 1).tobytes())
        columns = self.shape[1]
        codes = read_integers(read, self.codes, first * columns, (last - first) * columns)
        numbers = codes.reshape(-1, columns).astype(np.float32)
        numbers *= read_numbers(read, self.maxima, first, last - first)[:, None]
        numbers *= np.float32(1 / 127)  # by its reciprocal, as the library does
        return numbers


def _four_bits(
    name: str,
    state: TensorRef,
    kind: str,
    tensors: Mapping[str, TensorRef],
    default_dtype: str,
) -> FourBits:
    """A weight of nf4 or fp4, its parts checked against one another.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
        SourceError: its file is not here yet: the shapes are in it.
    """
    codes = required(tensors, name, state)
    table, maxima = (required(tensors, f"{name}.{part}", state) for part in ("quant_map", "absmax"))
    stated = _stated(state, kind)
    shape, block = tuple(stated["shape"]), stated["blocksize"]
    size = math.prod(shape)
    if codes.nbytes != -(-size // 2):
        raise corrupt(f"{codes.nbytes} bytes do not hold {list(shape)} codes of four bits", codes)
    why = f"'{name}'"
    of_shape(table, ("F32",), (16,), why=why)
    blocks = -(-size // block)
    nested = "nested_blocksize" in stated
    of_shape(maxima, ("U8",) if nested else ("F32",), (blocks,), why=why)
    if not nested:
        return FourBits(name, codes, shape, default_dtype, table, block, maxima, state)
    inner, outer = (
        required(tensors, f"{name}.nested_{part}", state) for part in ("quant_map", "absmax")
    )
    of_shape(inner, ("F32",), (256,), why=why)
    of_shape(outer, ("F32",), (-(-blocks // stated["nested_blocksize"]),), why=why)
    return FourBits(
        name, codes, shape, default_dtype, table, block, maxima, state, inner, outer,
        stated["nested_blocksize"], float(stated["nested_offset"]),
    )  # fmt: skip


def _stated(ref: TensorRef, kind: str) -> dict[str, Any]:
    """What the JSON text says, checked."""
    if kind not in _KINDS:
        raise corrupt(f"numbers of the kind '{kind[:40]}' are not read: nf4 and fp4 are", ref)
    text = small_bytes(ref)
    if text is None:
        raise not_here(ref)
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise corrupt(f"is no JSON text: {error}", ref) from None
    if not isinstance(stated, dict) or stated.get("quant_type") != kind:
        raise corrupt(f"does not say that its numbers are {kind}", ref)
    shape = stated.get("shape")
    counts = [*shape] if isinstance(shape, list) and shape else [None]
    nested = any(key.startswith("nested_") for key in stated)
    counts += [stated.get(key) for key in ("blocksize", *(["nested_blocksize"] if nested else []))]
    if any(type(number) is not int or number < 1 for number in counts) or (stated["blocksize"] % 2):
        raise corrupt(f"impossible shape {shape} or block sizes {counts[len(shape or ()) :]}", ref)
    offset = stated.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise corrupt(f"impossible nested_offset {offset!r}", ref)
    return stated


def _eight_bits(
    name: str, maxima: TensorRef, tensors: Mapping[str, TensorRef], default_dtype: str
) -> EightBits:
    """A weight of int8, its parts checked against one another.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
    """
    codes = required(tensors, name, maxima)
    if codes.dtype != "I8" or len(codes.shape) != 2:
        message = f"{codes.dtype} of shape {list(codes.shape)}: int8 weights are matrices of I8"
        raise corrupt(message, codes)
    of_shape(maxima, ("F32", "F16", "BF16"), codes.shape[:1], why=f"'{name}'")
    layout = tensors.get(f"{name}_format")
    if layout is not None:
        of_shape(layout, ("U8", "I8"), (), (1,), why=f"'{name}'")
        stated = small_bytes(layout)
        if stated is not None:
            _check_layout(layout, stated)
    return EightBits(name, codes, codes.shape, default_dtype, maxima, layout)


def _check_layout(ref: TensorRef, stated: bytes) -> None:
    """Other layouts were made for single kinds of GPU."""
    if stated != b"\0":
        raise corrupt(f"codes in the layout {stated[0]} are not read: by rows (0) they are", ref)
