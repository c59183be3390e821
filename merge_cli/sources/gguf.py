"""A GGUF file as a model's folder: what lies beside the weights elsewhere is made of its keys.

    config.json  generation_config.json  tokenizer.json ...  NAME.gguf -> the file

Every reader of a model's config or tokenizer finds it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.formats.gguf.header import Header
from merge_cli.formats.gguf.model import decode
from merge_cli.formats.gguf.tokenizer import end_tokens, tokenizer_files
from merge_cli.sources.linked import FileModel, write_files

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")  # a licence or a language


def lay_out_gguf(header: Header, root: Path, name: str, label: str) -> FileModel:
    """Write what a file's header says into the folder that has a link to it.

    Args:
        name: of the link, relative to the folder.

    Raises:
        SourceError: a model or a kind of numbers that is not read.
        CorruptFileError: a header that contradicts itself.
        ResourceError: the cache cannot be written.
    """
    decoded = decode(header, Path(name).name, label, root / name)
    files, reason = tokenizer_files(header.values)
    files["config.json"] = json.dumps(decoded.config, indent=2) + "\n"
    card = _card(header.values)
    if card:
        files[CARD] = card
    ends = end_tokens(header.values)
    if len(ends) > 1:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends}, indent=2) + "\n"
    write_files(root, files)
    notes = list(decoded.notes)
    if reason:
        notes.append(f"no tokenizer is made of the file: {reason}; take another model's")
    return FileModel(root, name, decoded, header.raw, tuple(notes))


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
