"""GPTQ: `qweight`, `qzeros`, `scales` and perhaps `g_idx`, of 2, 3, 4 and 8 bits.

`qweight` (I32 [in * bits / 32, out]) has the codes of one output one below the other, the first in
the lowest bits; `qzeros` (I32 [groups, out * bits / 32]) has those of a group side by side. The
first version of the format (`checkpoint_format: gptq`) stores zero points less one.

Frantar et al., arXiv:2210.17323; the layout is AutoGPTQ's and GPTQModel's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read
from merge_cli.errors import SourceError
from merge_cli.formats.grouped_integers import ModuleFormat
from merge_cli.formats.packed import unpack
from merge_cli.formats.storage_format import (
    quantization_of,
    usual_dtype,
)
from merge_cli.formats.stored_matrix import opening
from merge_cli.formats.stored_parts import corrupt, of_shape
from merge_cli.formats.transposed_integers import (
    CODES,
    ENDINGS,
    FLOATS,
    TransposedIntegers,
    group_of,
    group_size,
    scales_and_zeros,
)
from merge_cli.kernels.turned import turned_words

_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zero points


class Gptq(ModuleFormat):
    """The format. See `StorageFormat`."""

    name, method, codes, endings = "GPTQ", "gptq", CODES, ENDINGS

    def weights(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> Callable[[TensorRef], GptqTensor]:
        quantization, default_dtype = quantization_of(config), usual_dtype(config)
        version = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq")
        if version not in _VERSIONS or quantization.get("is_marlin_format"):
            message = f"GPTQ of the format '{version}' is not read: gptq and gptq_v2 are"
            raise SourceError(message, model=label, file="config.json")
        bits = quantization.get("bits")
        if type(bits) is not int or bits not in _BITS:
            message = f"GPTQ of {bits!r} bits is not read: of 2, 3, 4 and 8 is"
            raise SourceError(message, model=label, file="config.json")
        size, opened = group_size(quantization, label), opening()
        return lambda codes: _weight(codes, tensors, quantization, default_dtype, size, opened)


GPTQ = Gptq()


@dataclass(frozen=True)
class GptqTensor(TransposedIntegers):
    """A GPTQ weight.

    Attributes:
        added: to stored zero points.
    """

    added: int = 0

    @property
    def formula(self) -> str:
        order = "in another order" if self.order is not None else "in order"
        return f"GPTQ, {self.bits} bits, groups of {self.group} {order}, zeros + {self.added}"

    def code_rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        words = self.matrix("codes", self.codes).columns(read, first, last)
        raw = np.ascontiguousarray(words.T).view(np.uint8)
        return unpack(raw, self.bits)[:, : self.shape[1]].astype(np.float32)

    def turn(
        self, read: Read, first: int, last: int, zeros: Any, scales: Any, begin: int, out: Any
    ) -> None:
        words = self.matrix("codes", self.codes).columns(read, first, last)
        turned_words(words, self.bits, zeros, scales, self.group, begin, out)

    def zero_rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        # As many codes as fill whole words, whatever their bits: 32.
        begin, end = first // 32 * 32, -(-last // 32) * 32
        stop = min(end * self.bits // 32, self.zeros.shape[1])
        words = self.matrix("zeros", self.zeros).columns(read, begin * self.bits // 32, stop)
        codes = unpack(np.ascontiguousarray(words).view(np.uint8), self.bits)
        codes = (codes[:, first - begin : last - begin] + np.uint8(self.added)) & (2**self.bits - 1)
        return codes.T.astype(np.float32)


def _weight(
    codes: TensorRef,
    tensors: Mapping[str, TensorRef],
    quantization: Mapping[str, Any],
    default_dtype: str,
    size: int,
    opened: int,
) -> GptqTensor:
    """A module's weight, its parts checked against one another.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
    """
    module = codes.name.removesuffix(CODES)
    scales, zeros = scales_and_zeros(codes, tensors, GPTQ.name)
    order = tensors.get(f"{module}.g_idx")
    bits, fixed = quantization["bits"], not quantization.get("dynamic")
    words, outputs = codes.shape
    if order is not None and not fixed and len(order.shape) == 1 and order.size:
        bits = words * 32 // order.size
        if bits not in _BITS:
            raise corrupt(f"{words} words for {order.size} inputs: {bits} bits are not read", codes)
    inputs = order.size if order is not None else words * 32 // bits
    if inputs * bits != words * 32:
        raise corrupt(f"{words} words of 32 bits do not hold {inputs} codes of {bits} bits", codes)
    groups, why = scales.shape[0], f"'{codes.name}'"
    of_shape(scales, FLOATS, (groups, outputs), why=why)
    of_shape(zeros, ("I32",), (groups, -(-outputs * bits // 32)), why=why)
    if order is not None:
        of_shape(order, ("I32", "I64"), (inputs,), why=why)
    group = group_of(scales, inputs, size, fixed=fixed)
    version = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq")
    return GptqTensor(
        f"{module}.weight", codes, (outputs, inputs), default_dtype, bits, scales, zeros, order,
        group, opened, _VERSIONS[version],
    )  # fmt: skip
