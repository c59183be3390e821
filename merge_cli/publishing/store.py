"""Uploading a merged model to a store: s3://bucket/folder, gs://, or whatever fsspec writes to.

A store has no commits. So weights go first and config.json last: a folder with a config.json is a
whole model. What replaces another model takes that one's config.json away before it begins.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import is_weight
from merge_cli.errors import UsageError
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.publishing.package import REPORT, Package, pack
from merge_cli.remote.filesystem import WEB, explained, open_filesystem, protocol_of
from merge_cli.sources.result_files import is_same_file

_PART = 64 * 2**20  # bytes of a part of a large object; S3's ETag follows from it
_LOCAL = ("file", "local")  # protocols of this machine's own files
_LAST = ("model.safetensors.index.json", REPORT, "config.json")


@dataclass(frozen=True)
class Stored:
    """A finished upload.

    Attributes:
        files: name -> bytes, of all that belong to the model.
        sent: names of those that were not there already.
        removed: weights of the model that was there before.
    """

    address: str
    files: dict[str, int]
    sent: tuple[str, ...]
    removed: tuple[str, ...]


def upload(
    out: str | Path,
    address: str,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Stored:
    """Upload the merged model in the folder `out` to a folder of a store.

    Files that are there with the same content are not sent again: after an interruption the same
    call sends the rest.

    Args:
        address: of the folder; it need not be there yet.
        overwrite: replace another model in it.

    Raises:
        SourceError, CorruptFileError: `out` is not a finished merge.
        UsageError: the folder holds another model, or nothing can be uploaded there.
        RemoteError: no credentials, no right, no connection.
        ResourceError: a package that is not installed.
    """
    address = address.rstrip("/")
    if protocol_of(address) in WEB:
        hint = "Name a store (s3://, gs://), or a repository on the Hub: owner/name."
        raise UsageError("a web server takes no uploads", where=address, hint=hint)
    package = pack(Path(out))
    system = open_filesystem(address)
    _refuse_itself(system, address, package)
    present = _present(system, address)
    same = {name for name in package.files if _is_there(package, name, present)}
    stale = sorted(n for n in present if n not in package.files and is_weight(n) and "/" not in n)
    if not overwrite and REPORT not in same:
        weights = [name for name in present if is_weight(name)]
        # Its own weights, of an upload that was interrupted, are there with the same content.
        if stale or any(name not in same for name in weights):
            hint = "--overwrite replaces it; or name another folder."
            raise UsageError("holds another model", where=address, hint=hint)
    ordered = sorted(package.files, key=lambda n: (_LAST.index(n) if n in _LAST else -1, n))
    missing = [name for name in ordered if name not in same]
    if missing or stale:
        old = [name for name in _LAST if name in present and name not in same]
        _remove(system, address, old)
        # Whoever reads meanwhile shall not take what is there for a whole model.
        if "config.json" in same and (stale or any(is_weight(name) for name in missing)):
            _remove(system, address, ["config.json"])
            missing.append("config.json")
    done = sum(package.files[name] for name in package.files if name not in missing)
    for name in missing:
        with explained(address, name):
            _send(system, f"{address}/{name}", package.content(name))
        done += package.files[name]
        on_progress(Progress("upload", done, package.size, name))
    _remove(system, address, stale)
    return Stored(address, package.files, tuple(missing), tuple(stale))


def _refuse_itself(system: Any, address: str, package: Package) -> None:
    """Raise if an address of this machine leads to the files that are uploaded.

    Raises:
        UsageError: it would replace them, and take some away first.
    """
    if protocol_of(address) not in _LOCAL:
        return
    folder = Path(system._strip_protocol(address))
    if any(is_same_file(folder / name, package.folder / name) for name in package.files):
        hint = "Name another folder."
        raise UsageError("is the folder that is uploaded", where=address, hint=hint)


def _present(system: Any, address: str) -> Mapping[str, Mapping[str, Any]]:
    """What the folder has: name -> what the store says of it."""
    with explained(address):
        root = system._strip_protocol(address).rstrip("/")
        try:
            files = system.find(address, detail=True)
        except FileNotFoundError:
            return {}
    return {str(path).removeprefix(f"{root}/"): info for path, info in files.items()}


def _is_there(package: Package, name: str, present: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a store has this content, as far as it tells: by S3's ETag or Google's MD5."""
    info = present.get(name)
    if info is None or info.get("size") != package.files[name]:
        return False
    tag, md5 = str(info.get("ETag", "")).strip('"'), str(info.get("md5Hash", ""))
    if not tag and not md5:
        return False
    whole, parts = _digests(package.content(name))
    if md5:
        return md5 == base64.b64encode(whole).decode()
    several = f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"
    return tag in (whole.hex(), several)


def _digests(content: Path | bytes) -> tuple[bytes, list[bytes]]:
    """MD5 of a content, and of each of its parts."""
    if isinstance(content, bytes):
        digest = _md5(content).digest()
        return digest, [digest]
    whole, parts = _md5(), []
    with content.open("rb", buffering=0) as file:
        while True:
            part, left = _md5(), _PART
            while left and (block := file.read(min(left, 2**20))):
                part.update(block)
                whole.update(block)
                left -= len(block)
            if left < _PART:
                parts.append(part.digest())
            if left:
                return whole.digest(), parts


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _send(system: Any, path: str, content: Path | bytes) -> None:
    if protocol_of(path) in _LOCAL:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
    if isinstance(content, bytes):
        system.pipe_file(path, content)
        return
    options = {"chunksize": _PART} if protocol_of(path) in ("s3", "s3a") else {}
    system.put_file(str(content), path, **options)


def _remove(system: Any, address: str, names: list[str]) -> None:
    for name in names:
        with explained(address, name):
            system.rm_file(f"{address}/{name}")
