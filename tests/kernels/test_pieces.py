"""Short reads in one call: the bytes of the file, and where it ends."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.engine.files import Files, StageClock, StoredRead
from merge_cli.errors import CorruptFileError
from merge_cli.formats.stored_matrix import StoredMatrix
from merge_cli.kernels.pieces import read_pieces
from merge_cli.system.raw_io import FilePool


def a_file(root: Path, size: int) -> tuple[Path, bytes]:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    path = root / "weights"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_rows_are_the_files(tmp_path: Path, size: int) -> None:
    path, content = a_file(tmp_path, 100_000)
    offsets = np.random.default_rng(0).integers(0, len(content) - size, 50)
    fd = os.open(path, os.O_RDONLY)
    for read in (read_pieces, read_pieces.reference):
        out = np.zeros((50, size), np.uint8)
        assert read(fd, offsets, out) == 50
        for offset, row in zip(offsets.tolist(), out, strict=True):
            assert row.tobytes() == content[offset : offset + size]
    offsets[17] = len(content) - size + 1  # ends within this one
    for read in (read_pieces, read_pieces.reference):
        assert read(fd, offsets, np.zeros((50, size), np.uint8)) == 17
    os.close(fd)


@pytest.mark.parametrize(("height", "width"), [(40, 9000), (3000, 50), (1, 1)])
def test_strips_of_a_matrix(tmp_path: Path, height: int, width: int) -> None:
    """Long lines are read in pieces, short ones whole: the columns are the same."""
    before = 5
    path, content = a_file(tmp_path, 4 * (height * width + before))
    ref = TensorRef("w", path, "I32", (height, width), 0, len(content), "model")
    stored = np.frombuffer(content, np.uint32)[before:].reshape(height, width)
    read = StoredRead(Files(FilePool(os.O_RDONLY), FilePool(os.O_RDWR)), StageClock())
    matrix = StoredMatrix("codes", ref, before, height, width, 1)
    for first, last in [(0, width), (width // 3, width // 2 + 1), (width - 1, width)]:
        np.testing.assert_array_equal(matrix.columns(read, first, last), stored[:, first:last])


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    path, content = a_file(tmp_path, 4 * 40 * 9000)
    ref = TensorRef("w", path, "I32", (40, 9000), 0, len(content), "model")
    os.truncate(path, len(content) // 2)
    read = StoredRead(Files(FilePool(os.O_RDONLY), FilePool(os.O_RDWR)), StageClock())
    with pytest.raises(CorruptFileError, match="early"):
        StoredMatrix("codes", ref, 0, 40, 9000, 2).columns(read, 10, 20)
