"""A tokenizer in another form: one JSON document made of what transformers reads.

Older models have only a sentencepiece or tiktoken file. transformers turns it into a
tokenizer.json, because the tokenizer's class decides how its pieces are numbered.

The JSON files that a merge copies are looked at, too: an output with a broken one would not load.
Large ones are vocabularies, and are parsed where they are used.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import copied_files
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.sources.source import Source
from merge_cli.system.untrusted import (
    MAX_JSON,
    Unreadable,
    kind_of,
    may_hold_no_number,
    plain_json,
    read_bytes,
    read_json,
)
from merge_cli.tokenizer.files import _LISTS, _SMALL, settings_json, tokenizer_json


def tokenizer_document(source: Source) -> dict[str, Any]:
    """A model's tokenizer.json, or the one that transformers makes; the caller may change it.

    Raises:
        CorruptFileError: tokenizer.json has invalid fields.
        SourceError: there is no tokenizer.json, and transformers cannot make one.
    """
    if (source.root / "tokenizer.json").exists():
        return tokenizer_json(source)
    try:
        document = json.loads(_converted(source.root))
    except Exception as error:
        # A missing package, or anything that a tokenizer's class raises.
        message = f"its tokenizer cannot be read without a tokenizer.json ({error})"
        hint = "pip install 'merge-cli[sentencepiece]', or save its tokenizer with transformers."
        raise SourceError(message, model=source.label, hint=hint) from error
    assert isinstance(document, dict)
    return document


@lru_cache(maxsize=16)
def _converted(root: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
    return str(tokenizer.backend_tokenizer.to_str())


def check_companions(config_source: Source, tokenizer_source: Source) -> None:
    """Check the JSON files that a merge copies.

    Raises:
        CorruptFileError: a file that is no text, or holds NaN or Infinity; a small one that is not
            JSON, or not a mapping.
    """
    settings_json(tokenizer_source)
    labels = {source.root: source.label for source in (tokenizer_source, config_source)}
    # What a later stage makes, or a base of zeros, is not there: nothing is copied.
    for name, (path, root) in copied_files(config_source.root, tokenizer_source.root).items():
        if path.suffix != ".json":
            continue
        if path.stat().st_size > _SMALL and not _needs_parsing(path, labels[root], name):
            continue
        json = read_json(path, labels[root])
        if not isinstance(json, dict) and "/" not in name and name not in _LISTS:
            message = f"is not a mapping but {kind_of(json)}"
            raise CorruptFileError(message, model=labels[root], file=name)


def _needs_parsing(path: Path, label: str, name: str) -> bool:
    """Whether a large JSON file may hold what is no number.

    Raises:
        CorruptFileError: it is no text.
    """
    try:
        return may_hold_no_number(plain_json(read_bytes(path, limit=MAX_JSON)))
    except Unreadable as error:
        raise CorruptFileError(str(error), model=label, file=name) from None
