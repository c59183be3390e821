"""Tensors in files that `torch.save` writes: an uncompressed zip archive with a pickle.

    NAME/data.pkl     the object; a tensor in it names its storage, and how it is cut from there
    NAME/byteorder    little
    NAME/data/0 ...   the storages' bytes

The pickle is read as data (see `inert`). What it says of a tensor is held against the archive.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

from merge_cli.checkpoint.dtypes import SAFETENSORS_NAMES, width_of
from merge_cli.formats.inert import Record, name_of
from merge_cli.system.untrusted import Unreadable

STORAGE = "storage"  # the kind of reference that a tensor has to its bytes
_LOCAL_HEADER = 30  # bytes before a name: zip's specification, 4.3.7
_REBUILD = "torch._utils._rebuild_"
# What rebuilds a plain tensor, and where its arguments name the dtype, if they do.
_PLAIN = {f"{_REBUILD}tensor": None, f"{_REBUILD}tensor_v2": None, f"{_REBUILD}tensor_v3": 6}
_PARAMETERS = (f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state")
# What torch calls storages of a dtype where it does not call them untyped.
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_UNTYPED = ("UntypedStorage", "TypedStorage")


@dataclass(frozen=True)
class StoredTensor:
    """What a pickle says of a tensor.

    Attributes:
        dtype: safetensors' name.
        key: of its storage: the file `data/KEY`.
        first: elements of the storage before its own.
    """

    dtype: str
    shape: tuple[int, ...]
    key: str
    first: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * width_of(self.dtype)


def is_tensor(item: Any) -> bool:
    """Whether an object of a pickle is made by what rebuilds tensors, of whatever kind."""
    return isinstance(item, Record) and name_of(item).startswith(_REBUILD)


def stored_tensor(item: Any) -> StoredTensor:
    """A tensor of a pickle.

    Raises:
        Unreadable: not a plain tensor, or one whose rows are not in order.
    """
    if name_of(item) in _PARAMETERS and item.arguments:
        item = item.arguments[0]
    name = name_of(item)
    if name not in _PLAIN:
        raise Unreadable(f"is no plain tensor ({name.removeprefix(_REBUILD)[:60] or 'none'})")
    arguments = item.arguments
    if len(arguments) < 4 or not _is_storage(arguments[0]):
        raise Unreadable("is no plain tensor")
    (_, storage, key, _, _), first, sizes, strides = arguments[:4]
    at = _PLAIN[name]
    if at is None:
        dtype = STORAGES.get(name_of(storage).rpartition(".")[2])
    else:
        module, _, word = (
            name_of(arguments[at]).rpartition(".") if len(arguments) > at else ("",) * 3
        )
        dtype = SAFETENSORS_NAMES.get(word) if module == "torch" else None
    if dtype is None:
        raise Unreadable(f"is stored as {name_of(storage)[:60]}, which is not read")
    if type(key) is not str or type(first) is not int or first < 0:
        raise Unreadable("does not say where in its storage it is")
    if not _are_sizes(sizes) or not _are_sizes(strides) or len(strides) != len(sizes):
        raise Unreadable("has no shape, or strides that do not fit it")
    expected = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    if any(s != e and n > 1 for s, e, n in zip(strides, expected, sizes, strict=True)):
        raise Unreadable("has rows that are not in order")
    return StoredTensor(dtype, tuple(sizes), key, first)


def data_start(file: BinaryIO, base: int, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's file begin, from the archive's first byte.

    Args:
        base: where in the file the archive begins.

    Raises:
        Unreadable: they are compressed, or the archive contradicts itself.
    """
    if entry.compress_type:
        raise Unreadable("is compressed, which torch never does")
    file.seek(base + entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise Unreadable("has an archive that does not hold")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return entry.header_offset + _LOCAL_HEADER + name + extra


def check_byte_order(archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None) -> None:
    """Raise unless numbers are in little-endian order; early versions of torch do not say.

    Raises:
        Unreadable: they are not.
    """
    if entry is not None and (entry.file_size != 6 or archive.read(entry) != b"little"):
        raise Unreadable("has its numbers in big-endian byte order")


def _is_storage(reference: Any) -> bool:
    is_reference = isinstance(reference, tuple) and len(reference) == 5
    return is_reference and reference[0] == STORAGE


def _are_sizes(sizes: Any) -> bool:
    return (
        isinstance(sizes, tuple)
        and len(sizes) <= 64
        and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
    )
