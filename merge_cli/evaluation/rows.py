"""Reading data files: their rows, the tokens of a row, and which rows have the same content.

JSON lines (.jsonl, .json), a row each:

    {"text": ...}                            every token counts
    {"prompt": ..., "completion": ...}       only the completion's tokens count
    {"messages": [{"role", "content"}, ...]} only the last message's tokens count

and plain text (.txt, .md), whose one row is the file. A field that is `null` is absent. Of a row
that has several of these forms, the last one listed counts; that is said once for each file.

A search or training must be judged on rows that it has not seen. Files and lines do not decide
that: one file may be named twice, or have a row twice. Rows are the same where their texts are,
apart from white space and the way in which Unicode composes characters; other fields (ids, sources)
do not count.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.errors import SourceError
from merge_cli.evaluation.chat import TemplateError, render_chat
from merge_cli.evaluation.tokens import Encoded, encode_pair, first_unknown, row_start
from merge_cli.system.notices import say_once
from merge_cli.system.paths import require_text
from merge_cli.system.untrusted import MAX_TEXT, Unreadable, kind_of, parse_json, read_text

_PLAIN = (".txt", ".md")


@dataclass(frozen=True)
class Row:
    """One line of a data file; `line` counts from 1. No field is None."""

    line: int
    fields: Mapping[str, Any]
    file: Path

    def wrong(self, message: str, hint: str = "") -> SourceError:
        """An error about this row."""
        return SourceError(f"line {self.line}: {message}", file=str(self.file), hint=hint)

    def text(self, key: str) -> str:
        """A field that must be text."""
        value = self.fields.get(key)
        if not isinstance(value, str):
            got = f"got {kind_of(value)}" if key in self.fields else f"it has {listed(self.fields)}"
            raise self.wrong(f"needs '{key}', a text ({got})")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(f"'{key}' holds half of a surrogate pair, which is no text") from None
        return value

    def pair(self) -> tuple[str, str]:
        """The prompt and the text that counts, of rows that are no conversation.

        Raises:
            SourceError: the row has none of the forms above.
        """
        if "completion" in self.fields:
            self._leave_out("completion", "text")
            prompt = self.text("prompt") if "prompt" in self.fields else ""
            return prompt, self.text("completion")
        if "text" in self.fields:
            self._leave_out("text", "prompt")
            return "", self.text("text")
        message = f"has neither text nor completion nor messages (it has {listed(self.fields)})"
        raise self.wrong(message)

    def require_text(self) -> None:
        """Raise a SourceError if there is neither a text nor a conversation in it."""
        if "messages" in self.fields:
            self.messages()
        else:
            self.pair()

    def messages(self) -> list[Mapping[str, Any]]:
        """A conversation of at least two messages, each with a role.

        Raises:
            SourceError: the row has no such conversation.
        """
        self._leave_out("messages", "completion", "text")
        messages = self.fields.get("messages")
        if not isinstance(messages, list) or len(messages) < 2:
            raise self.wrong(f"'messages' must be a list of at least two (got {kind_of(messages)})")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping):
                raise self.wrong(f"message {number} is not a mapping but {kind_of(message)}")
            if not isinstance(message.get("role"), str):
                got = kind_of(message.get("role"))
                raise self.wrong(f"message {number} needs 'role', a text (got {got})")
        return messages

    def _leave_out(self, form: str, *others: str) -> None:
        """Say once of a file which fields of its rows do not count."""
        for name in others:
            if name in self.fields:
                message = f"of rows with '{form}' and '{name}', only '{form}' counts"
                say_once(f"{self.file}: {message}")


def make_row(line: int, fields: Mapping[str, Any], file: Path) -> Row:
    """A row; what is null in the data is absent."""
    return Row(line, {name: value for name, value in fields.items() if value is not None}, file)


def read_rows(path: Path) -> list[Row]:
    """Every row of a file; empty lines are skipped.

    Raises:
        SourceError: missing, not UTF-8, not JSON lines (with the line), or without a row.
    """
    require_text(path)
    try:
        # No limit on size: a data set may be larger than any file of a model.
        text = read_text(path, limit=max(MAX_TEXT, path.stat().st_size))
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError("no such data file", file=str(path)) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=str(path)) from None
    except Unreadable as error:
        raise SourceError(str(error), file=str(path)) from None
    except ValueError:  # a NUL in it
        raise SourceError("cannot be read: that is no file name", file=str(path)) from None
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
        fields = parse_json(line)
    except Unreadable as error:
        hint = "Write one JSON object in each line."
        raise SourceError(f"line {number} {error}", file=str(path), hint=hint) from None
    if not isinstance(fields, dict):
        message = f"line {number} is not a JSON object but {kind_of(fields)}"
        raise SourceError(message, file=str(path))
    return make_row(number, fields, path)


def encode(
    row: Row, tokenizer: Any, *, start: Sequence[int] | None = None, entries: int | None = None
) -> Encoded:
    """A row's tokens, after the tokenizer's beginning-of-sequence token where it has one.

    A chat template writes its own special tokens: nothing is added before them.

    Args:
        start: `row_start(tokenizer)`, if the caller has it.
        entries: number of embeddings of the model that reads them.

    Raises:
        SourceError: the row has none of the known forms, or a token that the model lacks.
    """
    if "messages" in row.fields:
        prompt, text = _chat(row, tokenizer)
        start = ()
    else:
        prompt, text = row.pair()
    encoded = encode_pair(prompt, text, tokenizer, row_start(tokenizer) if start is None else start)
    require_known(row, encoded.ids, tokenizer, entries)
    return encoded


def require_known(row: Row, ids: Sequence[int], tokenizer: Any, entries: int | None) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        SourceError: the row has such a token.
    """
    number = None if entries is None else first_unknown(ids, entries)
    if number is not None:
        token = tokenizer.convert_ids_to_tokens(number)
        message = (
            f"its token {token!r} has the number {number}, and the model {entries:,} embeddings"
        )
        raise row.wrong(message, "The tokenizer is not this model's.")


def _chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    """The rendered conversation without its last message, and the text that this one adds."""
    messages = row.messages()
    if not getattr(tokenizer, "chat_template", None):
        raise row.wrong("has messages, and the tokenizer no chat template to write them with")
    try:
        conversation = render_chat(tokenizer, messages)
        prompt = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
        if not conversation.startswith(prompt):
            prompt = render_chat(tokenizer, messages[:-1])
        conversation.encode()
    except UnicodeEncodeError:
        raise row.wrong("the chat template writes half of a surrogate pair") from None
    except TemplateError as error:
        raise row.wrong(f"the chat template refuses it: {error}") from None
    if not conversation.startswith(prompt):
        raise row.wrong("the chat template changes earlier messages when another one is added")
    return prompt, conversation[len(prompt) :]


def listed(fields: Mapping[str, Any]) -> str:
    """The fields that a row has."""
    return ", ".join(map(str, fields)) or "nothing"


def content_of(row: Row) -> bytes:
    """A fingerprint of a row's text."""
    fields = row.fields
    if "messages" in fields:
        messages = fields["messages"] if isinstance(fields["messages"], list) else []
        parts = [
            message.get("content") if isinstance(message, Mapping) else message
            for message in messages
        ]
        text = " ".join(map(_plain, parts))
    elif "completion" in fields:
        text = _plain(fields.get("prompt", "")) + _plain(fields["completion"])
    elif "text" in fields:
        text = _plain(fields["text"])
    else:
        parts_asked = [fields.get("prompt", "")]
        # The same question is the same row, in whatever form its answer is.
        parts_asked += fields["choices"] if isinstance(fields.get("choices"), list) else []
        if "choices" not in fields:
            parts_asked.append(fields.get("answer", ""))
        text = " ".join(map(_plain, parts_asked))
    if not text.strip():  # a row without known fields
        text = json.dumps(dict(fields), sort_keys=True, default=str)
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()


def distinct(rows: Iterable[Row]) -> dict[bytes, Row]:
    """The first row of each content, in order."""
    first_rows: dict[bytes, Row] = {}
    for row in rows:
        first_rows.setdefault(content_of(row), row)
    return first_rows


def without(rows: Iterable[Row], seen: Container[bytes]) -> list[Row]:
    """Rows whose content is not in `seen`."""
    return [row for row in rows if content_of(row) not in seen]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
