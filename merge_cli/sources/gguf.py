"""A GGUF file as a model's folder: what lies beside the weights elsewhere is made of its keys.

    CACHE/gguf/KEY/   config.json  generation_config.json  tokenizer.json ...  NAME.gguf -> the file

Every reader of a model's config or tokenizer finds it there. The folder is known by the file's
path, size, times and number, and made again when it is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.checkpoint.fingerprint import fingerprint_of
from merge_cli.errors import CorruptFileError
from merge_cli.formats.gguf.header import read_header
from merge_cli.formats.gguf.model import decode
from merge_cli.formats.gguf.tokenizer import end_tokens, tokenizer_files
from merge_cli.formats.storage_format import DecodedModel
from merge_cli.system.caches import cache_folder
from merge_cli.system.raw_io import unfinished_file, write_error

SUFFIX = ".gguf"
_FORMAT = 1
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")  # a licence or a language


@dataclass(frozen=True)
class GgufModel:
    """An opened file.

    Attributes:
        root: the folder with its config and tokenizer, and a link to it.
        headers: the link's name -> the file's header.
    """

    root: Path
    decoded: DecodedModel
    headers: Mapping[str, bytes]
    notes: tuple[str, ...]


def open_gguf(path: Path, label: str) -> GgufModel:
    """Read a file's header and lay out its folder.

    Raises:
        SourceError: a model or a kind of numbers that is not read.
        CorruptFileError: a header that does not hold.
        ResourceError: the cache cannot be written.
    """
    try:
        state = fingerprint_of(path)
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise CorruptFileError(message, model=label, file=path.name) from error
    real = Path(os.path.realpath(path))
    identity = repr((_FORMAT, version("merge-cli"), str(real), tuple(state)))
    root = cache_folder() / "gguf" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    link = root / path.name
    header = read_header(path, label)
    decoded = decode(header, path, label, link)
    files, reason = tokenizer_files(header.values)
    files["config.json"] = json.dumps(decoded.config, indent=2) + "\n"
    card = _card(header.values)
    if card:
        files[CARD] = card
    ends = end_tokens(header.values)
    if len(ends) > 1:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends}, indent=2) + "\n"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            content = text.encode()
            if not (root / name).is_file() or (root / name).read_bytes() != content:
                with unfinished_file(root / name) as new:
                    new.write_bytes(content)
        if not link.is_symlink():
            with suppress(FileExistsError):  # of another process, just now
                link.symlink_to(real)
    except OSError as error:
        raise write_error(error, root) from error
    notes = list(decoded.notes)
    if reason:
        notes.append(f"no tokenizer is made of the file: {reason}; take another model's")
    return GgufModel(root, decoded, {path.name: header.raw}, tuple(notes))


def _card(values: Mapping[str, Any]) -> str:
    """A model card with the licence and the languages that the file names; empty without them."""
    licence, languages = values.get("general.license"), values.get("general.languages")
    front: dict[str, Any] = {}
    if isinstance(licence, str) and _WORD.fullmatch(licence):
        front["license"] = licence
    if isinstance(languages, list):
        words = [word for word in languages[:200] if isinstance(word, str)]
        front["language"] = [word for word in words if _WORD.fullmatch(word)]
    lines = (f"{key}: {json.dumps(value)}" for key, value in front.items() if value)
    text = "\n".join(lines)
    return f"---\n{text}\n---\n" if text else ""
