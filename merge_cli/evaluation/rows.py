"""Data files to rows, and rows to token ids.

JSON lines (.jsonl, .json), a row each:

    {"text": ...}                            every token counts
    {"prompt": ..., "completion": ...}       only the completion's tokens count
    {"messages": [{"role", "content"}, ...]} only the last message's tokens count

and plain text (.txt, .md), whose one row is the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import SourceError
from merge_cli.evaluation.chat import TemplateError, render_chat

_PLAIN = (".txt", ".md")


@dataclass(frozen=True)
class Row:
    """One line of a data file; `line` counts from 1."""

    line: int
    fields: Mapping[str, Any]
    file: Path

    def wrong(self, what: str, hint: str = "") -> SourceError:
        """An error about this row."""
        return SourceError(f"line {self.line}: {what}", file=str(self.file), hint=hint)

    def text(self, key: str) -> str:
        """A field that must be text."""
        value = self.fields.get(key)
        if not isinstance(value, str):
            got = f"got {value!r}" if key in self.fields else f"it has {_listed(self.fields)}"
            raise self.wrong(f"needs '{key}', a text ({got})")
        return value


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row.

    Attributes:
        first: the first token that counts, never 0: nothing predicts that one.
        text: what is to be predicted.
    """

    ids: Sequence[int]
    first: int
    text: str = ""


def read_rows(path: Path) -> list[Row]:
    """Every row of a file; empty lines are skipped.

    Raises:
        SourceError: missing, not UTF-8, not JSON lines (with the line), or without a row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SourceError("no such data file", file=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read: {error}", file=str(path)) from None
    if path.suffix in _PLAIN:
        rows = [Row(1, {"text": text}, path)] if text.strip() else []
    else:
        rows = [
            _row(number, line, path)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    if not rows:
        raise SourceError("has no rows", file=str(path))
    return rows


def _row(number: int, line: str, path: Path) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        what = f"line {number} is not JSON: {error}"
        raise SourceError(
            what, file=str(path), hint="Write one JSON object in each line."
        ) from None
    if not isinstance(fields, dict):
        raise SourceError(f"line {number} is not a JSON object", file=str(path))
    return Row(number, fields, path)


def encode(row: Row, tokenizer: Any) -> Encoded:
    """A row's tokens, after the tokenizer's beginning-of-sequence token where it has one.

    A chat's template writes its own special tokens: nothing is put before them. Prompt and
    completion are tokenised apart, so that where the completion starts does not depend on it.

    Raises:
        SourceError: the row has none of the known forms.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    fields = row.fields
    if "messages" in fields:
        prompt, text = _chat(row, tokenizer)
        start = []
    elif "completion" in fields:
        prompt, text = row.text("prompt") if "prompt" in fields else "", row.text("completion")
    elif "text" in fields:
        prompt, text = "", row.text("text")
    else:
        raise row.wrong(
            f"has neither text nor completion nor messages (it has {_listed(fields)})",
        )
    before = start + token_ids(prompt, tokenizer)
    return Encoded([*before, *token_ids(text, tokenizer)], max(1, len(before)), text)


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text, without special tokens around it."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []


def _chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    """The rendered conversation before the last message, and what the last message adds."""
    messages = row.fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise row.wrong("'messages' must be a list of at least two")
    if not getattr(tokenizer, "chat_template", None):
        raise row.wrong("has messages, and the tokenizer no chat template to write them with")
    try:
        whole = render_chat(tokenizer, messages)
        prompt = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
        if not whole.startswith(prompt):
            prompt = render_chat(tokenizer, messages[:-1])
    except TemplateError as error:
        raise row.wrong(f"the chat template refuses it: {error}") from None
    if not whole.startswith(prompt):
        raise row.wrong("the chat template changes earlier messages when another one is added")
    return prompt, whole[len(prompt) :]


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "nothing"
