"""A GGUF file as a model's folder: what lies beside the weights elsewhere is made of its keys.

    CACHE/gguf/KEY/   config.json  generation_config.json  tokenizer.json ...  NAME.gguf -> the file

Every reader of a model's config or tokenizer finds it there. The folder is known by the file's
path, size, times and number, and made again when it is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from merge_cli.checkpoint.fingerprint import fingerprint_of
from merge_cli.errors import CorruptFileError
from merge_cli.formats.gguf.header import read_header
from merge_cli.formats.gguf.model import decode
from merge_cli.formats.gguf.tokenizer import end_tokens, tokenizer_files
from merge_cli.formats.storage_format import DecodedModel
from merge_cli.system.caches import cache_folder
from merge_cli.system.raw_io import replace_file, write_error

SUFFIX = ".gguf"
_FORMAT = 1


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
    ends = end_tokens(header.values)
    if len(ends) > 1:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends}, indent=2) + "\n"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            content = text.encode()
            if not (root / name).is_file() or (root / name).read_bytes() != content:
                replace_file(root / name, content)
        if not link.is_symlink():
            link.symlink_to(real)
    except OSError as error:
        raise write_error(error, root) from error
    notes = list(decoded.notes)
    if reason:
        notes.append(f"no tokenizer is made of the file: {reason}; take another model's")
    return GgufModel(root, decoded, {path.name: header.raw}, tuple(notes))
