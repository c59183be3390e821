"""Statistics of one model over its examples, as a file of float32 arrays.

Two kinds. `gram`: for each linear layer the matrix [in, in] of its inputs, X^T X over the number of
tokens; layers that see the same input share one. `fisher`: for each tensor the importance of its
elements, in its shape. The header's metadata says which tensors, as the model stores them, have
which array, and what the file was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.headers import TensorRef, parse_header, read_header_file
from merge_cli.checkpoint.tensors import is_weight
from merge_cli.errors import CorruptFileError
from merge_cli.system.untrusted import Unreadable, parse_json

FORMAT = "merge-cli statistics 2"
_METADATA = ("kind", "digest", "sum", "entries", "about", "digests")


@dataclass(frozen=True)
class StatisticsEntry:
    """Where a tensor's statistics are.

    Attributes:
        array: the name of an array of the file.
        input_first: the tensor is a layer that is stored [in, out].
        seen: whether anything in the array is not 0.
    """

    array: str
    input_first: bool = False
    seen: bool = True


@dataclass(frozen=True)
class StatisticsFile:
    """An opened file; arrays are read when they are asked for.

    Attributes:
        digest: of every array and of what it belongs to: other statistics, other bytes of a merge.
        about: what it was made of, and sums over all arrays, as `gathering` wrote them.
        entries: a tensor as the model stores it -> its statistics.
        digests: of every array's bytes.
        cached: whether it was there before.
    """

    path: Path
    kind: str
    digest: str
    about: Mapping[str, Any]
    entries: Mapping[str, StatisticsEntry] = field(repr=False)
    refs: Mapping[str, TensorRef] = field(repr=False)
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    cached: bool = True

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(ref.nbytes for ref in self.refs.values())

    def is_whole(self) -> bool:
        """Whether every array is what was written; reads them all."""
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            result = pool.map(_digest_of, self.refs.values())
            expected = [self.digests.get(name) for name in self.refs]
            return all(item == other for item, other in zip(result, expected, strict=True))

    def of(self, name: str) -> ModelStatistics | None:
        """The statistics of a tensor, or None where it has none."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        return ModelStatistics(self.refs[entry.array], entry, self.about, self.kind)


@dataclass(frozen=True)
class ModelStatistics:
    """The statistics of one tensor in one model.

    Attributes:
        about: of the model's file.
    """

    ref: TensorRef
    entry: StatisticsEntry
    about: Mapping[str, Any]
    kind: str

    def shape_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the statistics of a tensor of this shape."""
        if self.kind == "fisher":
            return shape
        width = shape[0 if self.entry.input_first else -1] if shape else 1
        return width, width

    def span(self, start: int, size: int, like: Any) -> Any:
        """Elements [start, start + size) of the flat array, float32.

        Args:
            like: a numpy array or tensor; the result is of its kind, on its device.

        Raises:
            CorruptFileError: the file has vanished or been cut off.
        """
        import numpy as np

        result = self._read(start, size)
        if isinstance(like, np.ndarray):
            return result
        import torch

        return torch.from_numpy(result).to(like.device)

    def whole(self, like: Any) -> Any:
        """The array in its shape."""
        return self.span(0, self.ref.size, like).reshape(self.ref.shape)

    def _read(self, start: int, size: int) -> Any:
        import numpy as np

        ref, hint = self.ref, "The same command makes it again."
        try:
            # Not mapped: pages of a mapping would count as this process's memory.
            result = np.fromfile(ref.path, np.float32, size, offset=ref.offset + 4 * start)
        except OSError as error:
            message = f"statistics cannot be read: {error.strerror}"
            raise CorruptFileError(message, file=str(ref.path), hint=hint) from error
        if len(result) != size:
            raise CorruptFileError("statistics end early", file=str(ref.path), hint=hint)
        return result


@dataclass(frozen=True)
class TensorStatistics:
    """The statistics of one tensor in every model that it is merged from.

    Attributes:
        models: None where a model has none of it.
    """

    models: tuple[ModelStatistics | None, ...]

    @property
    def complete(self) -> tuple[ModelStatistics, ...] | None:
        """Every model's, if every model has some, and not all are 0."""
        result = tuple(model for model in self.models if model is not None)
        every = len(result) == len(self.models)
        return result if every and any(item.entry.seen for item in result) else None


@dataclass(frozen=True)
class CalibrationStatistics:
    """What was gathered for a merge: a file for each source, by its place in the recipe."""

    files: tuple[StatisticsFile, ...]

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(file.digest for file in self.files)

    def misfit(self, operands: Sequence[Any], recipe_indexes: Sequence[int]) -> str:
        """What is wrong with the statistics of one output tensor; empty where they fit.

        Args:
            operands, recipe_indexes: as for `of`.
        """
        models = self.of(operands, recipe_indexes).models
        for tensor, index, model in zip(operands, recipe_indexes, models, strict=True):
            if model is None or (shape := model.shape_for(tensor.shape)) == model.ref.shape:
                continue
            where = self.files[index].path.name
            return f"{where} has statistics of {list(model.ref.shape)}, and not {list(shape)}"
        return ""

    def of(self, operands: Sequence[Any], recipe_indexes: Sequence[int]) -> TensorStatistics:
        """The statistics of one output tensor.

        Args:
            operands: the tensors that it is merged from (`checkpoint.tensors.Tensor`).
            recipe_indexes: numbers of their models in the recipe.
        """
        return TensorStatistics(
            tuple(
                # What is computed from several stored tensors is none that a model was asked about.
                self.files[recipe_index].of(tensor.name) if is_weight(tensor) else None
                for tensor, recipe_index in zip(operands, recipe_indexes, strict=True)
            )
        )


def open_statistics(path: Path) -> StatisticsFile:
    """Read the header of a file of statistics.

    Raises:
        CorruptFileError: not such a file, not whole, or with a header that is not what was written.
    """
    raw = read_header_file(path, "")
    refs = parse_header(raw, path, path.stat().st_size, "")
    length = struct.unpack("<Q", raw[:8])[0]
    try:
        metadata = parse_json(raw[8 : 8 + length]).get("__metadata__") or {}
        if metadata.get("format") != FORMAT:
            raise CorruptFileError("is not a file of statistics", file=str(path))
        kind, digest, is_complete, *texts = (metadata.get(key) for key in _METADATA)
        if None in (kind, digest, is_complete, *texts):
            raise Unreadable("lacks a part of its metadata")
        listed, about, digests = (parse_json(str(text)) for text in texts)
        if not all(isinstance(item, dict) for item in (listed, about, digests)):
            raise Unreadable("has metadata that is no mapping")
        shapes = {name: ref.shape for name, ref in refs.items()}
        made = statistics_digest(str(kind), listed, digests, about)
        if (made, header_sum(made, shapes)) != (digest, is_complete):
            raise Unreadable("has a header that is not what was written")
        entries = {name: _entry(name, entry, refs) for name, entry in listed.items()}
    except Unreadable as error:
        hint = "Remove it: the same command makes it again."
        raise CorruptFileError(str(error), file=str(path), hint=hint) from None
    return StatisticsFile(path, str(kind), str(digest), about, entries, refs, digests)


def open_statistics_files(paths: Sequence[Path], kind: str) -> CalibrationStatistics:
    """Those of each source of a recipe, in its order; headers alone are read.

    Raises:
        CorruptFileError: a file is missing, not whole, or holds statistics of another kind.
    """
    files = []
    for path in paths:
        if not path.is_file():
            hint = "A folder of statistics has one file for each model, in the recipe's order."
            raise CorruptFileError("is missing", file=str(path), hint=hint)
        file = open_statistics(path)
        if file.kind != kind:
            message = f"has statistics of the kind '{file.kind}', and not '{kind}'"
            raise CorruptFileError(message, file=str(path))
        files.append(file)
    return CalibrationStatistics(tuple(files))


def is_statistics(path: Path) -> bool:
    """Whether a file is one of statistics, whole or not: by what its header says of itself."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = file.read(min(length, 1 << 16))
    except OSError:
        return False
    return f'"format": "{FORMAT}"'.encode() in start


def _entry(name: str, entry: Any, refs: Mapping[str, TensorRef]) -> StatisticsEntry:
    fits = isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
    if not fits or entry[0] not in refs:
        raise Unreadable(f"has no statistics where it says that {name[:60]!r} has some")
    return StatisticsEntry(entry[0], bool(entry[1]), bool(entry[2]))


def statistics_digest(
    kind: str, entries: Mapping[str, Any], digests: Mapping[str, str], about: Mapping[str, Any]
) -> str:
    """Of every array and of what it belongs to."""
    content = json.dumps([kind, entries, dict(digests), dict(about)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def header_sum(digest: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """Of what a header says of the arrays, beside their digests."""
    shapes_listed = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(f"{digest} {json.dumps(shapes_listed)}".encode()).hexdigest()


def _digest_of(ref: TensorRef) -> str:
    """SHA-256 of an array's bytes; empty where they cannot be read."""
    state, left = hashlib.sha256(), ref.nbytes
    try:
        with ref.path.open("rb") as file:
            file.seek(ref.offset)
            while left and (block := file.read(min(left, 1 << 20))):
                state.update(block)
                left -= len(block)
    except OSError:
        return ""
    return state.hexdigest()
