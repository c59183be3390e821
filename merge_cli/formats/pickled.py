"""A file of `torch.save` as a model: `.pt`, `.bin`, `.pth`, `.ckpt`.

Nothing in the pickle is imported or called: it is read as data (`inert`), and its tensors' bytes
are read where they lie in the archive. So a training program's classes do no harm, and a file needs
no conversion before it is merged.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.inert import load_inert
from merge_cli.formats.torch_files import (
    STORAGE,
    check_byte_order,
    data_start,
    is_tensor,
    stored_tensor,
)
from merge_cli.system.untrusted import CONTROL, Unreadable

# Keys under which training programs save the model, beside optimizers and counters.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
# What wrappers of modules put before the names: DDP, torch.compile, FSDP.
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."
_MAX_PICKLE = 256 * 2**20
_MAX_NAME = 1000


@dataclass(frozen=True)
class PickledModel:
    """An opened file.

    Attributes:
        tensors: the model's, by name.
        left_out: names of what is no tensor, or lies beside the model.
    """

    tensors: Mapping[str, TensorRef]
    left_out: tuple[str, ...]


def open_pickle(file: BinaryIO, size: int, label: str, link: Path) -> PickledModel:
    """Read which tensors a file has, and where they lie in it.

    Args:
        size: of the file.
        link: where the tensors will be read from: the file, or a link to it.

    Raises:
        CorruptFileError: truncated, or contradicting itself.
        SourceError: of another form than torch writes today, or with tensors that are not read.
    """
    where = {"model": label, "file": link.name}
    if file.read(2) != b"PK":
        message = "is no archive as torch has written since 1.6"
        hint = "Load it with torch, if you trust it, and save it again."
        raise SourceError(message, **where, hint=hint)
    try:
        return _opened(file, size, label, link)
    except Unreadable as error:
        raise CorruptFileError(str(error), **where) from None
    except (OSError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CorruptFileError(f"cannot be read: {why[:100]}", **where) from None


def _opened(file: BinaryIO, size: int, label: str, link: Path) -> PickledModel:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        pickled = entries.get("data.pkl")
        if pickled is None or pickled.file_size > _MAX_PICKLE:
            raise Unreadable("is no file of torch's: it has no data.pkl, or too long a one")
        check_byte_order(archive, entries.get("byteorder"))
        # Every name is allowed: what it stands for is an empty record, whose contents are left out.
        content = load_inert(archive.read(pickled), lambda module, name: True, (STORAGE,))
    items, others = model_items(content, lambda item: isinstance(item, dict))
    tensors: dict[str, TensorRef] = {}
    starts: dict[str, tuple[int, int]] = {}  # key -> where its storage begins and ends
    left_out = list(others)
    for name, item in items.items():
        if not is_tensor(item):
            left_out.append(name)
            continue
        if not name or CONTROL.search(name) or len(name) > _MAX_NAME:
            raise Unreadable("has a tensor whose name is not text")
        try:
            stored = stored_tensor(item)
            entry = entries.get(f"data/{stored.key}")
            if entry is None:
                raise Unreadable("has no bytes in the archive")
            if stored.key not in starts:
                begin = data_start(file, 0, entry)
                starts[stored.key] = begin, min(begin + entry.file_size, size)
        except Unreadable as error:
            hint = "Load it with torch, and save a state dict of plain, contiguous tensors."
            raise SourceError(
                f"a tensor that {error}", model=label, file=link.name, tensor=name, hint=hint
            ) from None
        begin, end = starts[stored.key]
        start = begin + stored.first * width_of(stored.dtype)
        if start + stored.nbytes > end:
            raise Unreadable(
                f"does not hold all of {name}: {start + stored.nbytes - end} bytes lack"
            )
        tensors[name] = TensorRef(
            sys.intern(name), link, stored.dtype, stored.shape, start, stored.nbytes, label
        )
    if not tensors:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else ""
        message = "holds no tensors of a model" + (
            f" under its keys ({keys[:100]})" if keys else ""
        )
        hint = f"A state dict is looked for at the top and under {', '.join(WRAPPERS)}."
        raise SourceError(message, model=label, file=link.name, hint=hint)
    return PickledModel(plain_names(tensors), tuple(left_out))


def model_items(
    content: Any, is_mapping: Callable[[Any], bool]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict of what a file holds, and the names of what lies beside it.

    Raises:
        Unreadable: the file holds no mapping.
    """
    others: list[str] = []
    while is_mapping(content):
        key = next((key for key in WRAPPERS if is_mapping(content.get(key))), None)
        if key is None:
            return {str(name): item for name, item in content.items()}, tuple(others)
        others += [str(other) for other in content if other != key]
        content = content[key]
    raise Unreadable(f"holds no state dict, but a {type(cast(object, content)).__name__[:60]}")


def plain_names(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Tensors without what wrappers of modules have put before their names."""
    names = {name: _INSERTED.sub("", name) for name in tensors}
    if all(name.startswith(_PARALLEL) for name in names.values()):
        names = {old: name.removeprefix(_PARALLEL) for old, name in names.items()}
    if len(set(names.values())) < len(names):
        raise Unreadable("has several tensors of one name, but for what wrappers put before it")
    return {name: tensors[old]._replace(name=sys.intern(name)) for old, name in names.items()}
