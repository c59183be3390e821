"""Where a part's numbers begin within its `.distcp` file.

Each part is what `torch.save` writes for one tensor: an uncompressed zip archive with a small
pickle and the bytes. The archive's directory is read, the pickle is read as data, and what both say
must be what `.metadata` says.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.checkpoint.dtypes import DTYPES, width_of
from merge_cli.formats.dcp.inert import load_inert, name_of
from merge_cli.formats.dcp.metadata import Part
from merge_cli.system.untrusted import Unreadable, open_regular

_MAX_READ = 2**20  # a directory of seven files takes 500 bytes
_MAX_PICKLE = 2**16
_LOCAL_HEADER = 30  # bytes before a name: zip's specification, 4.3.7
# What torch calls storages of a dtype where it does not call them untyped.
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
_REBUILD = {
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"),
    "collections": ("OrderedDict",),
    "torch.storage": ("UntypedStorage", "TypedStorage"),
}


class Files:
    """The `.distcp` files of a checkpoint, each opened once; `with` closes them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, tuple[BinaryIO, int]] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _ in self._open.values():
            file.close()

    def data_start(self, part: Part, dtype: str) -> int:
        """Where in its file a part's numbers begin, in row-major order.

        Raises:
            Unreadable: the file is missing or truncated, or what is there is another tensor.
        """
        if part.file not in self._open:
            file = open_regular(self._root / part.file)
            self._open[part.file] = file, os.fstat(file.fileno()).st_size
        file, size = self._open[part.file]
        if part.start + part.length > size:
            raise Unreadable(f"truncated: a part ends at {part.start + part.length}, it at {size}")
        try:
            with zipfile.ZipFile(_Window(file, part.start, part.length)) as archive:
                return part.start + _checked(archive, file, part, dtype)
        except Unreadable:
            raise
        except Exception as error:  # a broken archive can raise anything
            if isinstance(error, OSError) and error.errno:
                raise
            raise Unreadable(f"a part is no file of torch's: {str(error)[:100]}") from None


def _checked(archive: zipfile.ZipFile, file: BinaryIO, part: Part, dtype: str) -> int:
    """Where the numbers begin, from the archive's first byte."""
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    pickled, data = entries.get("data.pkl"), entries.get("data/0")
    if pickled is None or data is None:
        raise Unreadable("a part is no tensor that torch has saved")
    if pickled.file_size > _MAX_PICKLE or pickled.compress_type or data.compress_type:
        raise Unreadable("a part is compressed, or its description too long")
    order = entries.get("byteorder")
    if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
        raise Unreadable("its numbers are in big-endian byte order")
    count, first = _described(archive.read(pickled), part, dtype)
    width = width_of(dtype)
    if (first + count) * width > data.file_size:
        raise Unreadable(f"a part of {count} numbers has {data.file_size} bytes")
    file.seek(part.start + data.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise Unreadable("a part's archive does not hold")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    begin = data.header_offset + _LOCAL_HEADER + name + extra
    if begin + data.file_size > part.length:
        raise Unreadable("a part's numbers go beyond it")
    return int(begin + first * width)


def _described(raw: bytes, part: Part, dtype: str) -> tuple[int, int]:
    """How many numbers a part has, and how many of its storage lie before them.

    Raises:
        Unreadable: it is of another shape or dtype, or its rows are not in order.
    """
    tensor = load_inert(raw, lambda module, name: _is_allowed(module, name), ("storage",))
    if name_of(tensor) == "torch._utils._rebuild_parameter" and tensor.arguments:
        tensor = tensor.arguments[0]
    is_plain = name_of(tensor).startswith("torch._utils.")
    arguments: tuple[Any, ...] = tensor.arguments if is_plain else ()
    if len(arguments) < 4 or not isinstance(arguments[0], tuple) or len(arguments[0]) != 5:
        raise Unreadable("a part is no plain tensor")
    (_, storage, key, _, _), first, sizes, strides = arguments[:4]
    if name_of(storage).rpartition(".")[2] != _STORAGES.get(dtype):
        raise Unreadable(f"a part is stored as {name_of(storage)}, not as {DTYPES[dtype][1]}")
    if key != "0" or type(first) is not int or first < 0 or sizes != part.sizes:
        raise Unreadable(f"a part is not of the shape {list(part.sizes)} that it should have")
    expected = [math.prod(part.sizes[i + 1 :]) for i in range(len(part.sizes))]
    if not isinstance(strides, tuple) or len(strides) != len(sizes):
        raise Unreadable("a part's strides are not those of its shape")
    in_order = (s == e or n == 1 for s, e, n in zip(strides, expected, sizes, strict=True))
    if not all(in_order):
        raise Unreadable("a part's rows are not in order")
    return math.prod(part.sizes), first


def _is_allowed(module: str, name: str) -> bool:
    is_storage = module == "torch" and name in _STORAGES.values()
    return is_storage or name in _REBUILD.get(module, ())


class _Window(io.RawIOBase):
    """A part of a file as a file, of which little is read at once."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError("before its beginning")  # as files do; zipfile expects it
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> Any:
        left = max(0, self._length - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if count > _MAX_READ:
            raise Unreadable("a part's archive has too long a directory")
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data
