"""Rows by what they say: the same text in another file, form or layout is the same row.

Whatever chooses (a search by its splits, learning by its held-out rows) must be judged on rows that
it has not seen. Files and lines do not tell: one file may be named twice, under two names, or hold
a row twice. Rows are the same where their texts are, but for white space and the way in which
Unicode composes characters; other fields (ids, sources) do not count.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Container, Iterable, Mapping
from typing import Any

from merge_cli.evaluation.rows import Row


def content_of(row: Row) -> bytes:
    """A digest of what a row says."""
    fields = row.fields
    if "messages" in fields:
        listed = fields["messages"] if isinstance(fields["messages"], list) else []
        parts = [one.get("content") if isinstance(one, Mapping) else one for one in listed]
        said = " ".join(map(_plain, parts))
    elif "completion" in fields:
        said = _plain(fields.get("prompt", "")) + _plain(fields["completion"])
    elif "text" in fields:
        said = _plain(fields["text"])
    else:
        asked = [fields.get("prompt", "")]
        # The same question is the same row, however its answer is written.
        asked += fields["choices"] if isinstance(fields.get("choices"), list) else []
        if "choices" not in fields:
            asked.append(fields.get("answer", ""))
        said = " ".join(map(_plain, asked))
    if not said.strip():  # it says nothing that is known here
        said = json.dumps(dict(fields), sort_keys=True, default=str)
    normal = " ".join(unicodedata.normalize("NFC", said).split())
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()


def distinct(rows: Iterable[Row]) -> dict[bytes, Row]:
    """The first row of each content, in order."""
    found: dict[bytes, Row] = {}
    for row in rows:
        found.setdefault(content_of(row), row)
    return found


def without(rows: Iterable[Row], seen: Container[bytes]) -> list[Row]:
    """Rows whose content is not among others'."""
    return [row for row in rows if content_of(row) not in seen]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
