"""Where a part's numbers begin within its `.distcp` file.

Each part is what `torch.save` writes for one tensor: an uncompressed zip archive with a small
pickle and the bytes. The archive's directory is read, the pickle is read as data, and what both say
must be what `.metadata` says.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.errors import MergeCliError
from merge_cli.formats.dcp.metadata import Part
from merge_cli.formats.inert import load_inert
from merge_cli.formats.torch_files import (
    STORAGE,
    STORAGES,
    check_byte_order,
    data_start,
    stored_tensor,
)
from merge_cli.system.range_file import PositionedFile
from merge_cli.system.untrusted import Unreadable, open_regular

_MAX_READ = 2**20  # a directory of seven files takes 500 bytes
_MAX_PICKLE = 2**16
_REBUILD = {
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"),
    "collections": ("OrderedDict",),
    "torch.storage": ("UntypedStorage", "TypedStorage"),
}


OpenFile = Callable[[str], tuple[BinaryIO, int]]  # of a name in the checkpoint: it, and its size


def on_disk(root: Path) -> OpenFile:
    """Opens the files of a folder."""

    def opened(name: str) -> tuple[BinaryIO, int]:
        file = open_regular(root / name)
        return file, os.fstat(file.fileno()).st_size

    return opened


class Files:
    """The `.distcp` files of a checkpoint, each opened once; `with` closes them."""

    def __init__(self, open_file: OpenFile) -> None:
        self._open_file = open_file
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
            self._open[part.file] = self._open_file(part.file)
        file, size = self._open[part.file]
        if part.start + part.length > size:
            raise Unreadable(f"truncated: a part ends at {part.start + part.length}, it at {size}")
        try:
            with zipfile.ZipFile(_Window(file, part.start, part.length)) as archive:
                return part.start + _checked(archive, file, part, dtype)
        except Unreadable:
            raise
        except Exception as error:  # a broken archive can raise anything
            if isinstance(error, MergeCliError) or (isinstance(error, OSError) and error.errno):
                raise
            raise Unreadable(f"a part is no file of torch's: {str(error)[:100]}") from None


def _checked(archive: zipfile.ZipFile, file: BinaryIO, part: Part, dtype: str) -> int:
    """Where the numbers begin, from the archive's first byte."""
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    pickled, data = entries.get("data.pkl"), entries.get("data/0")
    if pickled is None or data is None:
        raise Unreadable("a part is no tensor that torch has saved")
    if pickled.file_size > _MAX_PICKLE or pickled.compress_type:
        raise Unreadable("a part's description is compressed, or too long")
    try:
        check_byte_order(archive, entries.get("byteorder"))
        tensor = stored_tensor(load_inert(archive.read(pickled), _is_allowed, (STORAGE,)))
        begin = data_start(file, part.start, data)
    except Unreadable as error:
        raise Unreadable(f"a part {error}") from None
    if tensor.dtype != dtype:
        raise Unreadable(f"a part is stored as {tensor.dtype}, not as {dtype}")
    if tensor.key != "0" or tensor.shape != part.sizes:
        raise Unreadable(f"a part is not of the shape {list(part.sizes)} that it should have")
    skipped = tensor.first * width_of(dtype)
    if skipped + tensor.nbytes > data.file_size:
        count = math.prod(tensor.shape)
        raise Unreadable(f"a part of {count} numbers has {data.file_size} bytes")
    if begin + data.file_size > part.length:
        raise Unreadable("a part's numbers go beyond it")
    return begin + skipped


def _is_allowed(module: str, name: str) -> bool:
    is_storage = module == "torch" and name in STORAGES
    return is_storage or name in _REBUILD.get(module, ())


class _Window(PositionedFile):
    """A part of a file as a file, of which little is read at once."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__(length)
        self._file, self._start = file, start

    def read(self, size: int | None = -1) -> Any:
        count = self._bytes_to_read(size)
        if count > _MAX_READ:
            raise Unreadable("a part's archive has too long a directory")
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data
