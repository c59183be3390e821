"""AWQ in its gemm layout: `qweight`, `qzeros` and `scales`, of 4 bits.

`qweight` (I32 [in, out / 8]) and `qzeros` (I32 [groups, out / 8]) have eight outputs in a word, in
the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.

Lin et al., arXiv:2306.00978; the layout is AutoAWQ's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read
from merge_cli.errors import SourceError
from merge_cli.formats.grouped_integers import ModuleFormat
from merge_cli.formats.storage_format import (
    quantization_of,
    usual_dtype,
)
from merge_cli.formats.stored_matrix import opening
from merge_cli.formats.stored_parts import of_shape
from merge_cli.formats.transposed_integers import (
    CODES,
    ENDINGS,
    FLOATS,
    TransposedIntegers,
    group_of,
    group_size,
    scales_and_zeros,
)
from merge_cli.kernels.turned import turned_eights

_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # where each of eight outputs begins in a word, in bits


class Awq(ModuleFormat):
    """The format. See `StorageFormat`."""

    name, method, codes, endings = "AWQ", "awq", CODES, ENDINGS

    def weights(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> Callable[[TensorRef], AwqTensor]:
        quantization, default_dtype = quantization_of(config), usual_dtype(config)
        self._check(quantization, label)
        size, opened = group_size(quantization, label), opening()
        return lambda codes: _weight(codes, tensors, default_dtype, size, opened)

    def _check(self, quantization: Mapping[str, Any], label: str) -> None:
        """What else AWQ has been written as is not read."""
        layout = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
        bits = quantization.get("bits", quantization.get("w_bit"))
        message = ""
        if layout != "gemm":
            message = f"AWQ of the layout '{layout}' is not read: gemm is"
        elif bits != 4:
            message = f"AWQ of {bits!r} bits is not read: of 4 is"
        elif quantization.get("zero_point", True) is not True:
            message = "AWQ without zero points is not read"
        if message:
            raise SourceError(message, model=label, file="config.json")


AWQ = Awq()


@dataclass(frozen=True)
class AwqTensor(TransposedIntegers):
    """An AWQ weight."""

    @property
    def formula(self) -> str:
        return f"AWQ, {self.bits} bits, groups of {self.group}"

    def code_rows(self, read: Read, first: int, last: int) -> Any:
        return self._unpacked(read, "codes", self.codes, first, last)

    def turn(
        self, read: Read, first: int, last: int, zeros: Any, scales: Any, begin: int, out: Any
    ) -> None:
        words = self.matrix("codes", self.codes).columns(read, first // 8, -(-last // 8))
        turned_eights(words, _SHIFTS, zeros, scales, self.group, first % 8, begin, out)

    def zero_rows(self, read: Read, first: int, last: int) -> Any:
        return self._unpacked(read, "zeros", self.zeros, first, last)

    def _unpacked(self, read: Read, role: str, ref: TensorRef, first: int, last: int) -> Any:
        """Rows [first, last) of eights in words: float32."""
        import numpy as np

        begin = first // 8
        words = self.matrix(role, ref).columns(read, begin, -(-last // 8))
        shifts = np.array(_SHIFTS, np.uint32)[:, None]
        codes = ((words.T[:, None, :] >> shifts) & np.uint32(15)).reshape(-1, len(words))
        return codes[first - begin * 8 : last - begin * 8].astype(np.float32)


def _weight(
    codes: TensorRef,
    tensors: Mapping[str, TensorRef],
    default_dtype: str,
    size: int,
    opened: int,
) -> AwqTensor:
    """A module's weight, its parts checked against one another.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
    """
    module = codes.name.removesuffix(CODES)
    scales, zeros = scales_and_zeros(codes, tensors, AWQ.name)
    inputs, words = codes.shape
    groups, why = scales.shape[0], f"'{codes.name}'"
    of_shape(scales, FLOATS, (groups, words * 8), why=why)
    of_shape(zeros, ("I32",), (groups, words), why=why)
    group = group_of(scales, inputs, size, fixed=True)
    return AwqTensor(
        f"{module}.weight", codes, (words * 8, inputs), default_dtype, 4, scales, zeros, None,
        group, opened,
    )  # fmt: skip
