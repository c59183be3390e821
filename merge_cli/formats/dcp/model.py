"""The model in a distributed checkpoint: its tensors by name, put together while they are read."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.dcp.files import METADATA
from merge_cli.formats.dcp.metadata import Part, StoredTensor, parse_metadata
from merge_cli.formats.dcp.storage import Files, OpenFile, on_disk
from merge_cli.system.untrusted import Unreadable, read_bytes

_MAX_METADATA = 256 * 2**20
# Keys under which training programs save what is no weight of the model.
_NO_WEIGHTS = re.compile(
    r"(optim|optimizer|optimizers|optim_state|optimizer_state|optimizer_state_dict|opt"
    r"|chained_\d+|lr_scheduler|scheduler|scaler|dataloader|train_state|trainer|rng|rng_state)(\.|$)"
)
# And those under which they save the model.
_WRAPPERS = ("app", "state", "state_dict", "model_state_dict", "module", "model")
# What wrappers of modules put into names.
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WHOLE_MODEL = re.compile(r"(model|lm_head|transformer|gpt_neox|backbone)\.")


@dataclass(frozen=True, eq=False)
class ShardedTensor:
    """A tensor whose parts are a grid. See `tensors.Tensor`.

    Attributes:
        parts: each with where it begins in the tensor.
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[tuple[tuple[int, ...], TensorRef]]

    @property
    def model(self) -> str:
        return self.parts[0][1].model

    @property
    def dtype(self) -> str:
        return self.parts[0][1].dtype

    @property
    def default_dtype(self) -> str:
        return self.dtype

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * width_of(self.dtype)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for _, ref in self.parts)

    @property
    def formula(self) -> str:
        return f"parts at {[offsets for offsets, _ in self.parts]} of {self.shape}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """The runs that parts have within the span, all those of a part by one read."""
        width, raw = width_of(self.dtype), buffer.cast("B")
        stop = start + len(raw) // width
        for runs, ref in self._runs:
            low, high = runs.within(start, stop)
            if low >= high:
                continue
            if high - low == 1:  # a run by itself goes where it belongs
                begin = runs.start(low)
                first, last = max(start, begin), min(stop, begin + runs.length)
                target = raw[(first - start) * width : (last - start) * width]
                read(ref, low * runs.length + first - begin, target)
                continue
            held = memoryview(bytearray((high - low) * runs.length * width))
            read(ref, low * runs.length, held)
            for number in range(low, high):
                begin = runs.start(number)
                first, last = max(start, begin), min(stop, begin + runs.length)
                at = (number - low) * runs.length + first - begin
                part = held[at * width : (at + last - first) * width]
                raw[(first - start) * width : (last - start) * width] = part

    @cached_property
    def _runs(self) -> list[tuple[_Runs, TensorRef]]:
        return [(_Runs(self.shape, offsets, ref.shape), ref) for offsets, ref in self.parts]


class _Runs:
    """The runs of a part: elements that follow one another in the tensor and in the part.

    Attributes:
        length: of each.
        count: of them.
    """

    def __init__(
        self, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        cut = max((i for i in range(len(shape)) if sizes[i] != shape[i]), default=0)
        inner = math.prod(shape[cut + 1 :])
        self.length = sizes[cut] * inner if shape else 1
        self._sizes = sizes[:cut]
        self.count = math.prod(self._sizes)
        self._strides = [math.prod(shape[i + 1 :]) for i in range(cut)]
        first = offsets[cut] * inner if shape else 0
        self._first = first + sum(o * s for o, s in zip(offsets[:cut], self._strides, strict=True))

    def start(self, number: int) -> int:
        """Where in the tensor a run begins; later runs begin later."""
        position = self._first
        for size, stride in zip(reversed(self._sizes), reversed(self._strides), strict=True):
            number, index = divmod(number, size)
            position += index * stride
        return position

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """The runs that have elements in [start, stop), from and to."""
        return self._first_from(start - self.length + 1), self._first_from(stop)

    def _first_from(self, position: int) -> int:
        """The first run that begins at a position or behind it."""
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            if self.start(middle) < position:
                low = middle + 1
            else:
                high = middle
        return low


@dataclass(frozen=True)
class DcpModel:
    """An opened checkpoint.

    Attributes:
        tensors: the model's, by name.
        files: what they are read from, relative to the folder.
        left_out: names of what is no weight.
    """

    tensors: Mapping[str, Tensor]
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def open_checkpoint(root: Path, label: str, open_file: OpenFile | None = None) -> DcpModel:
    """Read a checkpoint's metadata, and find every part of the model's tensors.

    Args:
        root: the folder; of a checkpoint elsewhere the one where its files will be, which has
            `.metadata` already.
        open_file: opens the other files, where they are not in the folder.

    Raises:
        CorruptFileError: metadata or parts that do not hold.
        SourceError: no weights of a model.
    """
    try:
        metadata = parse_metadata(read_bytes(root / METADATA, limit=_MAX_METADATA))
    except Unreadable as error:
        raise CorruptFileError(str(error), model=label, file=METADATA) from None
    names = model_names({name: stored.path for name, stored in metadata.tensors.items()})
    if not names:
        message = "a distributed checkpoint without weights of a model"
        raise SourceError(message, model=label, file=METADATA)
    tensors: dict[str, Tensor] = {}
    files: dict[str, None] = {}
    with Files(open_file or on_disk(root)) as opened:
        for full_name, name in names.items():
            stored = metadata.tensors[full_name]
            if name in tensors:
                message = "two tensors of the checkpoint have this name"
                raise CorruptFileError(message, model=label, file=METADATA, tensor=name)
            parts = [
                (part.offsets, _opened(opened, part, stored, name, root, label))
                for part in stored.parts
            ]
            files |= dict.fromkeys(part.file for part in stored.parts)
            whole = len(parts) == 1
            tensors[name] = parts[0][1] if whole else ShardedTensor(name, stored.shape, parts)
    left_out = (*metadata.others, *(name for name in metadata.tensors if name not in names))
    return DcpModel(tensors, tuple(files), left_out)


def _opened(
    files: Files, part: Part, stored: StoredTensor, name: str, root: Path, label: str
) -> TensorRef:
    try:
        start = files.data_start(part, stored.dtype)
    except Unreadable as error:
        raise CorruptFileError(str(error), model=label, file=part.file, tensor=name) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise CorruptFileError(message, model=label, file=part.file, tensor=name) from error
    nbytes = math.prod(part.sizes) * width_of(stored.dtype)
    path = root / part.file
    return TensorRef(sys.intern(name), path, stored.dtype, part.sizes, start, nbytes, label)


def model_names(paths: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Which tensors are the model's: full name -> the model's own name.

    Args:
        paths: full name -> the keys that lead to the tensor in what was saved.
    """
    names = {full_name: _INSERTED.sub("", ".".join(path)) for full_name, path in paths.items()}
    kept = {full_name: name for full_name, name in names.items() if not _is_state(name)}
    while True:
        wrapper = next((w for w in _WRAPPERS if _wraps(w, kept.values())), None)
        if wrapper is None:
            break
        stripped = {f: name.removeprefix(f"{wrapper}.") for f, name in kept.items()}
        kept = {f: name for f, name in stripped.items() if not _is_state(name)}
    return kept


def _is_state(name: str) -> bool:
    """Whether a name is of an optimizer, a scheduler or the like."""
    return _NO_WEIGHTS.match(name) is not None


def _wraps(wrapper: str, names: Iterable[str]) -> bool:
    """Whether everything lies under a key that is not part of the model's names.

    `model.` begins the names of most models, too: it is a wrapper's where names go on as a whole
    model's do (`model.model.`, `model.lm_head.`).
    """
    inner = [name.removeprefix(f"{wrapper}.") for name in names if name.startswith(f"{wrapper}.")]
    if not inner or len(inner) != len(list(names)):
        return False
    return wrapper != "model" or any(_WHOLE_MODEL.match(name) or _is_state(name) for name in inner)
