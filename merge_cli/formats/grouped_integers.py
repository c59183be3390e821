"""Integers of few bits with a scale, and perhaps a zero point, for each group of columns.

GPTQ, AWQ, HQQ, MLX and compressed-tensors store the same idea in different orders of bits:

    number = (code - zero) * scale      with a bias instead of a zero point: code * scale + bias

What tells them apart is a format's own file: how codes are cut out of words, and which way round a
matrix lies. What they share is here: a module's parts becoming one weight, and the formula by
groups. How integers of four bits are written is in formats/int4_encoding.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.config import WITH_CONV1D
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.errors import SourceError
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.int4_encoding import Int4Encoding
from merge_cli.formats.packed import PackedRows, PackedTensor, unpack
from merge_cli.formats.small_floats import read_scales
from merge_cli.formats.storage_format import QUANTIZATION, DecodedModel, quant_method, unquantised
from merge_cli.formats.stored_parts import corrupt, read_integers, reject_leftovers
from merge_cli.kernels.codes import scale_groups


def read_modules(
    tensors: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    packed: Sequence[TensorRef],
    weight: Callable[[TensorRef], PackedTensor],
    *,
    name: str,
    endings: tuple[str, ...],
    key: str = QUANTIZATION,
) -> DecodedModel:
    """A model whose modules store their weight as several tensors, each weight as numbers.

    Args:
        packed: the codes of every module.
        weight: makes a module's weight from its codes.
        name: of the format, for the note.
        endings: of names that the format alone gives: none may be left over.
        key: of config.json that says how weights are quantised.

    Raises:
        CorruptFileError: a weight that is stored twice, or a part without codes.
    """
    as_numbers: dict[str, Tensor] = dict(tensors)
    for codes in packed:
        made = weight(codes)
        for part in made.stored:
            as_numbers.pop(part.name)
        if made.name in as_numbers:
            raise corrupt(f"is stored a second time, as '{made.name}'", codes)
        as_numbers[made.name] = made
    reject_leftovers(as_numbers.values(), endings)
    note = f"{len(packed)} {name} weights are read as numbers; they are lossy"
    return DecodedModel(as_numbers, unquantised(config, key), (note,))


class ModuleFormat(ABC):
    """A format that names codes by an ending, with what they are scaled with beside them.

    Attributes:
        name: what messages call it.
        method: `quant_method` of config.json.
        codes: the ending of a module's codes.
        endings: of all names that the format alone gives.
    """

    name: str
    method: str
    codes: str
    endings: tuple[str, ...]

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        is_named = quant_method(config) == self.method
        return is_named and any(name.endswith(self.codes) for name in tensors)

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        weight = self.weights(tensors, config, label)
        reject_conv1d(config, label, self.name)
        packed = [ref for ref in tensors.values() if ref.name.endswith(self.codes)]
        return read_modules(tensors, config, packed, weight, name=self.name, endings=self.endings)

    @abstractmethod
    def weights(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> Callable[[TensorRef], PackedTensor]:
        """What makes a module's weight from its codes.

        Raises:
            SourceError: a variant that is not read.
        """


def reject_conv1d(config: Mapping[str, Any], label: str, name: str) -> None:
    """Models whose own layers are stored [in, out] would have to be turned once more.

    Raises:
        SourceError: names the model's kind.
    """
    kind = str(config.get("model_type", ""))
    if kind in WITH_CONV1D:
        message = f"{name} weights of {kind}, whose layers are stored [in, out], are not read"
        raise SourceError(message, model=label)


def apply_groups(numbers: Any, scales: Any, zeros: Any, order: Any = None) -> Any:
    """(code - zero) * scale, in place.

    Args:
        numbers: codes as numpy float32 [rows, columns], changed.
        scales: numpy float32 [rows, groups], or [1, 1].
        zeros: the same; None for none.
        order: the group of each column; None where equally many columns follow one another.
    """
    if order is not None:
        if zeros is not None:
            numbers -= zeros[:, order]
        numbers *= scales[:, order]
        return numbers
    if zeros is not None:
        numbers.reshape(len(numbers), scales.shape[-1], -1)[:] -= zeros[:, :, None]
    scale_groups(numbers, scales)
    return numbers


def read_order(read: Read, ref: TensorRef, groups: int) -> Any:
    """The group of each column: numpy, flat.

    Raises:
        CorruptFileError: it names a group that is not there.
    """
    order = read_integers(read, ref, 0, ref.size)
    if order.min() < 0 or order.max() >= groups:
        raise corrupt(f"names groups from {order.min()} to {order.max()}: there are {groups}", ref)
    return order


@dataclass(frozen=True)
class GroupedIntegers(PackedRows):
    """Those of compressed-tensors, by rows.

    Attributes:
        bits: of a code; 8 of plain int8, too.
        scales: one number, or [..., rows, groups].
        zeros: like the scales: packed by columns if the codes are packed, else int8; or None.
        groups: the group of each column; None where they follow one another.
        checked: `weight_shape`, which may not have been there when the model was opened.
        size_of_group: as the config says; 0 for a whole row, and where it says nothing.
    """

    bits: int
    scales: TensorRef
    zeros: TensorRef | None
    groups: TensorRef | None
    checked: TensorRef | None
    size_of_group: int = 0

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        extra = (self.zeros, self.groups, self.checked)
        return (self.codes, self.scales, *(ref for ref in extra if ref is not None))

    @property
    def formula(self) -> str:
        zeros, groups = self.zeros is not None, self.groups is not None
        return f"{self.bits}-bit integers, zeros {zeros}, groups {groups}, {self.scales.shape}"

    @property
    def encoding(self) -> Encoding | str:
        across = 1 if self.scales.size == 1 else self.scales.shape[-1]
        if self.bits != 4 or self.codes.dtype != "I32":
            return f"integers of {self.bits} bits are not written: packed ones of 4 bits are"
        if self.groups is not None:
            return "integers with columns in another order (weight_g_idx) are not written"
        if self.scales.shape != (*self.shape[:-1], across):
            return "integers with one scale for all are not written: by groups or rows they are"
        if self.zeros is not None and self.zeros.dtype != "I32":
            return "integers with zero points that are not packed are not written"
        group = self.size_of_group if across == 1 else self.shape[-1] // across
        encoding = Int4Encoding(group, self.zeros is None, self.scales.dtype, len(self.shape))
        return encoding.unfit(self.shape) or encoding

    def rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        if self.checked is not None:
            stated = read_integers(read, self.checked, 0, self.checked.size).tolist()
            check_shape(self.checked, stated, self.shape)
        columns, count = self.shape[-1], last - first
        per_row = self.codes.shape[-1]
        if self.codes.dtype == "I8":
            codes = read_integers(read, self.codes, first * per_row, count * per_row)
            numbers = codes.reshape(count, columns).astype(np.float32)
        else:
            words = read_integers(read, self.codes, first * per_row, count * per_row)
            codes = unpack(words.view(np.uint8).reshape(count, -1), self.bits)[:, :columns]
            numbers = codes.astype(np.float32)
            numbers -= 2 ** (self.bits - 1)
        across = 1 if self.scales.size == 1 else self.scales.shape[-1]
        if self.scales.size == 1:
            scales = read_scales(read, self.scales, 0, 1).reshape(1, 1)
        else:
            scales = read_scales(read, self.scales, first * across, count * across)
            scales = scales.reshape(count, across)
        zeros = self._zeros(read, first, last, across) if self.zeros is not None else None
        order = read_order(read, self.groups, across) if self.groups is not None else None
        return apply_groups(numbers, scales, zeros, order)

    def _zeros(self, read: Read, first: int, last: int, across: int) -> Any:
        """Zero points of rows: float32 [rows, groups]."""
        import numpy as np

        assert self.zeros is not None
        if self.zeros.dtype == "I8":
            if self.zeros.size == 1:
                return read_integers(read, self.zeros, 0, 1).astype(np.float32).reshape(1, 1)
            zeros = read_integers(read, self.zeros, first * across, (last - first) * across)
            return zeros.astype(np.float32).reshape(-1, across)
        per_word = 32 // self.bits
        lines = self.zeros.shape[-2]
        parts = []
        for matrix, low, high in self.by_matrix(first, last):
            begin, end = low // per_word, -(-high // per_word)
            start, size = (matrix * lines + begin) * across, (end - begin) * across
            words = read_integers(read, self.zeros, start, size).reshape(-1, across)
            raw = np.ascontiguousarray(words.T).view(np.uint8)
            codes = unpack(raw, self.bits)[:, low - begin * per_word : high - begin * per_word]
            parts.append(codes.T.astype(np.float32))
        return np.concatenate(parts) - np.float32(2 ** (self.bits - 1))


def check_shape(ref: TensorRef, stated: list[int], shape: tuple[int, ...]) -> None:
    """`weight_shape` says what the weight is; of a stack, perhaps what each matrix is.

    Raises:
        CorruptFileError: it says something else.
    """
    if tuple(stated) not in (shape, shape[-2:]):
        raise corrupt(f"says {stated}, but the weight is {list(shape)}", ref)
