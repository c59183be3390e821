"""HQQ as `HQQLinear` saves itself: codes of 1, 2, 3, 4 and 8 bits in groups along the inputs.

`W_q` has the codes of the flat weight in as many parts as a byte (of 3 bits: 32 bits) has codes,
the first part in the highest bits. `scale` and `zero` have a number for each group, and a number is
(code - zero) * scale. What `shape`, `nbits`, `group_size`, `axis` and `packing` say is stored in
tensors, too, and read when the model is opened.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023; the layout is
that of the package hqq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, read_numbers
from merge_cli.formats.grouped_integers import ModuleFormat
from merge_cli.formats.packed import PackedTensor
from merge_cli.formats.storage_format import usual_dtype
from merge_cli.formats.stored_parts import (
    as_bytes,
    corrupt,
    not_here,
    of_shape,
    required,
    small_bytes,
    small_numbers,
)

_CODES = ".W_q"
_FLOATS = ("F32", "F16", "BF16")
# What it is packed as -> bits of a code, codes in a word, bytes of a word.
_PACKINGS = {
    "8bit_u8": (8, 1, 1),
    "4bit_u8": (4, 2, 1),
    "3bit_32": (3, 10, 4),
    "2bit_u8": (2, 4, 1),
    "1bit_u8": (1, 8, 1),
}
# What else a layer says of itself. The first ones must be nought: scales that are codes themselves.
_NOUGHT = ("quant_scale", "quant_zero")
_SAID = (
    "shape",
    "nbits",
    "group_size",
    "axis",
    "packing",
    "view_as_float",
    "unpack_view_dtype",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
    *_NOUGHT,
)
_ENDINGS = (_CODES, *(f".{name}" for name in (*_SAID, "scale", "zero", "zero_scale")))


class Hqq(ModuleFormat):
    """The format. See `StorageFormat`."""

    name, method, codes, endings = "HQQ", "hqq", _CODES, _ENDINGS

    def weights(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> Callable[[TensorRef], HqqTensor]:
        default_dtype = usual_dtype(config)
        return lambda codes: _weight(codes, tensors, default_dtype)


HQQ = Hqq()


@dataclass(frozen=True)
class HqqTensor(PackedTensor):
    """An HQQ weight.

    Attributes:
        packing: a key of the table above.
        scales, zeros: of the groups.
        group: numbers of a group, which follow one another.
        about: what else is stored of it, which says how it is packed.
    """

    packing: str
    scales: TensorRef
    zeros: TensorRef
    group: int
    about: tuple[TensorRef, ...]

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes, self.scales, self.zeros, *self.about)

    @property
    def formula(self) -> str:
        return f"HQQ, {self.packing}, groups of {self.group}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        stop = start + len(out)
        bits, per_word, width = _PACKINGS[self.packing]
        kind = np.uint8 if width == 1 else np.uint32
        words = self.codes.nbytes // width  # and numbers of each part
        position = start
        while position < stop:
            part, inside = divmod(position, words)
            count = min(stop - position, words - inside)
            raw: Any = np.empty(count, kind)
            read(as_bytes(self.codes), inside * width, raw.view(np.uint8).data)
            codes = (raw >> kind(bits * (per_word - 1 - part))) & kind(2**bits - 1)
            out[position - start : position - start + count] = codes
            position += count
        first, last = start // self.group, -(-stop // self.group)
        begin = start - first * self.group
        for ref, apply in ((self.zeros, np.subtract), (self.scales, np.multiply)):
            numbers = np.repeat(read_numbers(read, ref, first, last - first), self.group)
            apply(out, numbers[begin : begin + len(out)], out=out)


def _weight(codes: TensorRef, tensors: Mapping[str, TensorRef], default_dtype: str) -> HqqTensor:
    """A module's weight, its parts checked against one another.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
        SourceError: its file is not here yet: the shapes are in it.
    """

    module = codes.name.removesuffix(_CODES)

    def part(name: str) -> TensorRef:
        return required(tensors, f"{module}.{name}", codes)

    shape = small_numbers(part("shape"))
    packing = small_bytes(part("packing"))
    if shape is None or packing is None:
        raise not_here(codes)
    stated = {
        name: (small_numbers(part(name)) or [0])[0] for name in ("nbits", "group_size", "axis")
    }
    kind = packing.decode("ascii", "replace")
    if kind not in _PACKINGS or _PACKINGS[kind][0] != stated["nbits"]:
        message = (
            f"{stated['nbits']} bits as '{kind[:20]}' are not read: {', '.join(_PACKINGS)} are"
        )
        raise corrupt(message, part("packing"))
    if stated["axis"] != 1:
        raise corrupt(f"groups along the axis {stated['axis']} are not read: 1 is", part("axis"))
    for name in _NOUGHT:
        ref = tensors.get(f"{module}.{name}")
        if ref is not None and any(small_bytes(ref) or b""):
            raise corrupt("scales that are quantised themselves are not read", ref)
    size, group = math.prod(shape), stated["group_size"]
    if len(shape) != 2 or min(shape) < 1 or group < 1 or size % group:
        raise corrupt(f"groups of {group} do not divide a weight of {shape}", part("shape"))
    _, per_word, width = _PACKINGS[kind]
    groups = size // group
    lines = -(-groups // per_word)
    if codes.nbytes != lines * group * width or (width == 1 and groups % per_word):
        raise corrupt(f"{codes.nbytes} bytes do not hold {shape} codes as {kind}", codes)
    scales, zeros = part("scale"), part("zero")
    for ref in (scales, zeros):
        of_shape(ref, _FLOATS, (groups, 1), (groups,), why=f"'{codes.name}'")
    about = tuple(tensors[n] for n in (f"{module}.{name}" for name in _SAID) if n in tensors)
    return HqqTensor(
        f"{module}.weight", codes, tuple(shape), default_dtype, kind, scales, zeros, group, about
    )
