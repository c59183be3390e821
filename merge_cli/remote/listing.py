"""What lies at an address: the files, with their sizes and versions.

A store lists its folders. A web server is asked for each file that a model may have.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from merge_cli.checkpoint.auxiliary_files import COMPANION_NAMES
from merge_cli.errors import CorruptFileError, RemoteError
from merge_cli.formats.dcp.files import METADATA, NAMES
from merge_cli.formats.dcp.metadata import parse_metadata
from merge_cli.remote.filesystem import (
    AbsentError,
    DeniedError,
    UnreachableError,
    explained,
)
from merge_cli.system.untrusted import Unreadable, parse_json

_INDEX = "model.safetensors.index.json"
# What a web server is asked for, as it has no list of its files.
ASKED = ("config.json", _INDEX, "model.safetensors", "README.md", "adapter_config.json",
          "adapter_model.safetensors", "chat_template.jinja", *sorted(COMPANION_NAMES))  # fmt: skip
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Digest", "LastModified",
             "Last-Modified", "last_modified", "mtime", "created")  # fmt: skip
_MAX_INDEX = 100_000_000
_MAX_FILES = 10_000
_ATTEMPTS = 3  # in a row that bring nothing
_PAUSE = 0.5  # seconds; longer with every attempt
T = TypeVar("T")


def listed(system: Any, address: str) -> dict[str, tuple[int, str]]:
    """The files of a store's folder, and of folders in it."""
    with explained(address):
        root = system._strip_protocol(address).rstrip("/")
        files = system.find(address, maxdepth=2, detail=True)
    if len(files) > _MAX_FILES:
        message = f"more than {_MAX_FILES} files: this is no model's folder"
        raise RemoteError(message, model=address)
    result = {}
    for path, info in files.items():
        name = str(path).removeprefix(f"{root}/")
        if name != path and name and ".." not in name.split("/"):
            result[name] = _size_and_version(info, address, name)
    return result


def asked(system: Any, address: str) -> dict[str, tuple[int, str]]:
    """The files that a web server has, of those that models have."""
    from concurrent.futures import ThreadPoolExecutor  # plans of local models never get here

    with ThreadPoolExecutor(8) as pool:

        def ask(names: Sequence[str]) -> dict[str, tuple[int, str]]:
            answers = pool.map(lambda name: _if_there(system, address, name), names)
            return {n: answer for n, answer in zip(names, answers, strict=True) if answer}

        result = ask(ASKED)
        if _INDEX in result:
            result |= ask(_shards(system, address))
        elif not any(name.endswith(".safetensors") for name in result):
            result |= ask((METADATA, NAMES))
            if METADATA in result:
                result |= ask(_parts(system, address))
    return result


def _shards(system: Any, address: str) -> list[str]:
    """The files that the index names."""
    with explained(address, _INDEX):
        raw = system.cat_file(f"{address}/{_INDEX}", start=0, end=_MAX_INDEX)
    try:
        index = parse_json(raw)
    except Unreadable as error:
        raise CorruptFileError(str(error), model=address, file=_INDEX) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    plain = (n for n in names if isinstance(n, str) and re.fullmatch(r"[\w.-]{1,200}", n))
    return sorted(plain)[:_MAX_FILES]  # what is missing, the reader of the index reports


def _parts(system: Any, address: str) -> list[str]:
    """The files that the metadata of a distributed checkpoint name."""
    with explained(address, METADATA):
        raw = system.cat_file(f"{address}/{METADATA}", start=0, end=_MAX_INDEX)
    try:
        tensors = parse_metadata(raw).tensors
    except Unreadable as error:
        raise CorruptFileError(str(error), model=address, file=METADATA) from None
    return sorted({part.file for tensor in tensors.values() for part in tensor.parts})[:_MAX_FILES]


def _if_there(system: Any, address: str, name: str) -> tuple[int, str] | None:
    """A file's size and version; None where it is not there."""
    try:
        return with_retries(lambda: looked_at(system, address, name))
    except AbsentError:
        return None
    except DeniedError:
        if name == ASKED[0]:
            raise
        return None


def looked_at(system: Any, address: str, name: str) -> tuple[int, str]:
    with explained(address, name):
        info = system.info(f"{address}/{name}")
        if info.get("type") == "directory":
            raise IsADirectoryError
    return _size_and_version(info, address, name)


def _size_and_version(info: Mapping[str, Any], address: str, name: str) -> tuple[int, str]:
    """What a store says of a file; times as seconds, as which lists and answers do not agree.

    Raises:
        RemoteError: the store does not say.
    """
    size = info.get("size")
    value = next((info[key] for key in _VERSIONS if info.get(key)), "")
    version = str(value.timestamp() if isinstance(value, datetime) else value)
    if type(size) is not int or not version:
        message = "the server does not say how long it is, or which version (ETag, Last-Modified)"
        hint = "Download it, and name the file on disk."
        raise RemoteError(message, model=address, file=name, hint=hint)
    return size, version


def with_retries(action: Callable[[], T]) -> T:
    """Try an action again soon, where the store did not answer.

    Raises:
        RemoteError: as the action does.
    """
    for tries in range(1, _ATTEMPTS):
        try:
            return action()
        except UnreachableError:
            _sleep(_PAUSE * tries)
    return action()


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
