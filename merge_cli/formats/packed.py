"""What packed formats share: codes of few bits, weights computed by rows, strips of a matrix.

`PackedRows` are computed by rows of the last dimension, so that a block may begin anywhere.
Formats that store a matrix the other way round ([in, out]) read it by strips: columns of what is
stored are rows of the weight. A block is a few rows, and cutting those out of the file would
read every line of it for each block; so each thread keeps the latest strip of each model.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor, fill_rows, read_pieces, reading
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.encoding import Encoding
from merge_cli.kernels.codes import spread

STRIP_BYTES = 2**22  # of codes, for each thread and model; of their scales it is less
PACKED = ("U8", "I8", "I32", "U32")  # dtypes of packed codes
_SKIPPED = 2**13  # bytes of a line: from here on its piece is read without the rest
_SLAB_BYTES = 2**18  # of lines that are read whole to cut a strip out of them, in the cache
_KEPT = 64  # strips that a thread keeps: of more models than are merged at once
_SMALL = 64  # numbers that are read while a model is opened
_TEXT = 10_000  # bytes of a text that is
_openings = count()


def unpack(raw: Any, bits: int) -> Any:
    """Codes of bytes in which they lie one after another, the lowest bits first.

    Args:
        raw: numpy uint8 [..., bytes].
        bits: of a code, 1 to 8.

    Returns:
        numpy uint8 [..., 8 * bytes // bits]; of 3, 5, 6 and 7 bits as many more as fill whole
        groups of eight.
    """
    import numpy as np

    if bits == 8:
        return raw
    if 8 % bits == 0:
        return spread(raw, bits)
    mask = (1 << bits) - 1
    groups = -(-raw.shape[-1] // bits)  # eight codes are as many bytes as a code has bits
    padded = np.zeros((*raw.shape[:-1], groups * bits), np.uint8)
    padded[..., : raw.shape[-1]] = raw
    padded = padded.reshape(*raw.shape[:-1], groups, bits)
    word = np.zeros(padded.shape[:-1], np.uint64)
    for position in range(bits):
        word |= padded[..., position].astype(np.uint64) << np.uint64(8 * position)
    codes = np.empty((*word.shape, 8), np.uint8)
    for position in range(8):
        codes[..., position] = (word >> np.uint64(position * bits)) & np.uint64(mask)
    return codes.reshape(*raw.shape[:-1], -1)


@dataclass(frozen=True)
class PackedTensor(ABC):
    """A weight that is computed in float32 from packed codes. See `tensors.Tensor`.

    Attributes:
        name: of the weight, which may be another than that of its codes.
        codes: the packed codes.
        shape: of the weight: [..., rows, columns].
        default_dtype: what it would be stored in without quantisation.
    """

    name: str
    codes: TensorRef
    shape: tuple[int, ...]
    default_dtype: str

    @property
    def model(self) -> str:
        return self.codes.model

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    @abstractmethod
    def stored(self) -> tuple[TensorRef, ...]:
        """The codes first, then what they are scaled with."""

    @property
    @abstractmethod
    def formula(self) -> str:
        """See `tensors.Tensor`."""

    @property
    def encoding(self) -> Encoding | str:
        """See `encoding.Encoded`."""
        return f"{self.formula} is not written"

    @abstractmethod
    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """See `tensors.Tensor`."""


class PackedRows(PackedTensor):
    """One that is computed by rows, so that a block may begin in the middle of one."""

    @abstractmethod
    def rows(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the matrices one below the other: float32 [rows, columns]."""

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        fill_rows(buffer, start, self.shape[-1], partial(self.rows, read))

    def by_matrix(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Rows [first, last) of a stack by matrices: which one, from and to which of its rows."""
        height, row = self.shape[-2], first
        while row < last:
            matrix, inside = divmod(row, height)
            stop = min(height, inside + last - row)
            yield matrix, inside, stop
            row += stop - inside


def corrupt(message: str, ref: TensorRef) -> CorruptFileError:
    """The error for a stored tensor."""
    return CorruptFileError(message, model=ref.model, file=ref.path.name, tensor=ref.name)


def required(tensors: Mapping[str, TensorRef], name: str, ref: TensorRef) -> TensorRef:
    """The tensor of a name, which `ref` cannot be read without.

    Raises:
        CorruptFileError: there is none.
    """
    if name not in tensors:
        raise corrupt(f"cannot be read without '{name}', which is not there", ref)
    return tensors[name]


def of_shape(
    ref: TensorRef, dtypes: Collection[str], *shapes: tuple[int, ...], why: str
) -> TensorRef:
    """The tensor itself, if it has one of the dtypes and of the shapes.

    Args:
        why: what it must fit, for the message.

    Raises:
        CorruptFileError: it does not.
    """
    if ref.dtype in dtypes and ref.shape in shapes:
        return ref
    allowed = " or ".join(str(list(shape)) for shape in shapes)
    names = ", ".join(sorted(dtypes))
    message = (
        f"{ref.dtype} of shape {list(ref.shape)} does not fit {why}: {names} of {allowed} does"
    )
    raise corrupt(message, ref)


# Of activations and of the key-value cache: of no use without arithmetic in few bits.
_ACTIVATIONS = (
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".input_global_scale",
    ".input_zero_point",
    ".output_zero_point",
    ".scale_input",
)
_CODES = ("U8", "I8", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def is_activation(name: str) -> bool:
    """Whether a tensor's name is that of a scale of activations or caches."""
    return name.endswith(_ACTIVATIONS)


def drop_activations(tensors: dict[str, Tensor]) -> list[str]:
    """Take the scales of activations and caches out, and say so."""
    dropped = [name for name in tensors if is_activation(name)]
    for name in dropped:
        del tensors[name]
    if not dropped:
        return []
    return [f"{len(dropped)} scales of activations and caches are left out ({dropped[0]}, ...)"]


def reject_leftovers(tensors: Iterable[Tensor], endings: tuple[str, ...]) -> None:
    """No tensor of a format may be left over: it would be merged as if it were a weight.

    Args:
        endings: of names that the format alone gives.

    Raises:
        CorruptFileError: names the first one.
    """
    for tensor in tensors:
        if not isinstance(tensor, TensorRef):
            continue
        if tensor.name.endswith(endings) or tensor.dtype in _CODES:
            raise corrupt(f"belongs to no weight that is read here ({tensor.dtype})", tensor)


def small_numbers(ref: TensorRef) -> list[int] | None:
    """A short tensor of integers, read at once; None where its file is still to be fetched.

    Raises:
        CorruptFileError: it cannot be read, or is none.
    """
    if ref.dtype not in ("I32", "I64") or ref.size > _SMALL:
        raise corrupt(f"{ref.dtype} of shape {list(ref.shape)}: not a few whole numbers", ref)
    if not ref.path.exists():
        return None
    with reading() as read:
        return [int(number) for number in read_integers(read, ref, 0, ref.size)]


def not_here(ref: TensorRef) -> SourceError:
    """The error for a model whose headers do not say what its weights are."""
    message = "the shapes of its weights are inside its files, which are not here yet"
    hint = "Download it (`hf download NAME --local-dir FOLDER`), and name the folder."
    return SourceError(message, model=ref.model, hint=hint)


def small_bytes(ref: TensorRef) -> bytes | None:
    """The bytes of a short tensor, read at once; None where its file is still to be fetched.

    Raises:
        CorruptFileError: it cannot be read, or is not short.
    """
    if ref.nbytes > _TEXT:
        raise corrupt(f"{ref.nbytes} bytes: no more than {_TEXT} are read here", ref)
    if not ref.path.exists():
        return None
    raw = bytearray(ref.nbytes)
    with reading() as read:
        read(ref, 0, memoryview(raw))
    return bytes(raw)


def as_bytes(ref: TensorRef) -> TensorRef:
    """The same bytes, whatever dtype a library keeps its codes in."""
    return ref._replace(dtype="U8", shape=(ref.nbytes,))


def read_integers(read: Read, ref: TensorRef, start: int, count: int) -> Any:
    """Whole numbers [start, start + count) of a tensor of any integer dtype: numpy, flat."""
    import numpy as np

    kinds = {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64}
    numbers = np.empty(count, kinds[ref.dtype])
    if count:
        read(ref, start, numbers.view(np.uint8).data)
    return numbers


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix inside a stored tensor, of which strips of columns are read.

    Attributes:
        role: what it is to a weight (codes, scales): a thread keeps one strip of each.
        start: its first element's number in the tensor.
        height, width: in stored elements.
        opening: tells apart what was opened at different times: files may have changed between.
    """

    role: str
    ref: TensorRef
    start: int
    height: int
    width: int
    opening: int

    def columns(self, read: Read, first: int, last: int) -> Any:
        """Columns [first, last): numpy [height, last - first] of unsigned integers or bytes."""
        import numpy as np

        item = width_of(self.ref.dtype)
        wide = max(1, min(self.width, STRIP_BYTES // max(1, self.height * item)))
        parts = []
        for number in range(first // wide, -(-last // wide)):
            begin = number * wide
            strip = self._strip(read, begin, min(begin + wide, self.width))
            parts.append(strip[:, max(0, first - begin) : last - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _strip(self, read: Read, first: int, last: int) -> Any:
        """A strip from the thread's latest, or read."""
        kept = _threads.kept
        strip_key = f"{self.role} of {self.ref.model}"
        key = (self.opening, self.ref, self.start, first, last)
        latest = kept.get(strip_key)
        if latest is not None and latest[0] == key:
            return latest[1]
        if len(kept) >= _KEPT:
            kept.clear()
        strip = self._read(read, first, last)
        kept[strip_key] = (key, strip)
        return strip

    def _read(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[width_of(self.ref.dtype)]
        strip = np.empty((self.height, last - first), kind)
        # Pieces of lines by themselves, where reading all of the lines would take longer.
        if (self.width - last + first) * strip.itemsize > _SKIPPED:
            starts = self.start + first + np.arange(self.height, dtype=np.int64) * self.width
            read_pieces(read, self.ref, starts, strip)
            return strip
        step = max(1, _SLAB_BYTES // (self.width * strip.itemsize))
        slab = np.empty((min(step, self.height), self.width), kind)
        for low in range(0, self.height, step):
            high = min(low + step, self.height)
            lines = slab[: high - low]
            read(self.ref, self.start + low * self.width, lines.view(np.uint8).reshape(-1).data)
            strip[low:high] = lines[:, first:last]
        return strip


def opening() -> int:
    """A number for a model that is opened now."""
    return next(_openings)


class _Strips(threading.local):
    """The latest strips of a thread: by role and model, each with what tells it apart."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, Any]] = {}


_threads = _Strips()
