"""A model's tokenizer as one JSON document: tokenizer.json, or what transformers makes of pieces.

Older models bring a sentencepiece or tiktoken file alone. How its pieces are numbered is a matter
of the tokenizer's class (T5 has tokens behind them, XLM-R moves them by one), which is asked.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.tokenizer_files import tokenizer_json, tokens_of
from merge_cli.errors import SourceError


def tokenizer_document(source: Source) -> dict[str, Any]:
    """The document, to be changed freely.

    Raises:
        CorruptFileError: tokenizer.json does not hold what it should.
        SourceError: there is none, and transformers makes none of the files.
    """
    if (source.root / "tokenizer.json").exists():
        return tokenizer_json(source)
    try:
        found = json.loads(_converted(source.root))
    except Exception as error:
        # From a missing package to whatever a tokenizer's class raises over a file.
        what = f"its tokenizer cannot be read without a tokenizer.json ({error})"
        hint = "pip install 'merge-cli[sentencepiece]', or save its tokenizer with transformers."
        raise SourceError(what, model=source.label, hint=hint) from error
    assert isinstance(found, dict)
    return found


def converted_vocabulary(source: Source) -> dict[str, int]:
    """Token -> number of a model without a file that lists them.

    Raises:
        SourceError: see `tokenizer_document`.
    """
    return tokens_of(tokenizer_document(source))


@lru_cache(maxsize=16)
def _converted(root: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
    return str(tokenizer.backend_tokenizer.to_str())
