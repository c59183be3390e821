"""A file of prompts, each answered by itself: read and checked whole before a model answers.

prompts.txt      one prompt in each line
prompts.jsonl    one row in each line: {"prompt": ...} or {"messages": [...]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.chat.answers import Answer, Sampling, answer
from merge_cli.chat.conversation import Conversation
from merge_cli.errors import MergeCliError, SourceError
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.rows import Row, listed, make_row, read_rows
from merge_cli.system.untrusted import MAX_TEXT, Unreadable, kind_of, read_text

_ROWS = (".jsonl", ".json")


@dataclass(frozen=True)
class Prompt:
    """One row of a file of prompts; either `text`, or `messages` that are not empty."""

    line: int
    text: str = ""
    messages: Sequence[Mapping[str, Any]] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """Every prompt of a file; empty lines are skipped.

    Raises:
        SourceError: the file cannot be read, has no prompt, or a row that is none, with its line.
    """
    if path.suffix in _ROWS:
        return [_prompt(row) for row in read_rows(path)]
    try:
        text = read_text(path, limit=MAX_TEXT)
    except Unreadable as error:
        raise SourceError(str(error), file=str(path)) from None
    lines = enumerate(text.splitlines(), start=1)
    prompts = [
        Prompt(line, make_row(line, {"prompt": words}, path).text("prompt"))
        for line, words in lines
        if words.strip()
    ]
    if not prompts:
        raise SourceError("has no prompts", file=str(path))
    return prompts


def _prompt(row: Row) -> Prompt:
    if "messages" not in row.fields:
        if "prompt" not in row.fields:
            raise row.wrong(f"needs 'prompt' or 'messages' (it has {listed(row.fields)})")
        return Prompt(row.line, row.text("prompt"))
    messages = row.fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise row.wrong(f"'messages' must be a list with at least one (got {kind_of(messages)})")
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise row.wrong(f"message {number} needs '{key}', a text (got {kind_of(value)})")
    if messages[-1]["role"] == "assistant":
        hint = "Leave out the answer that is asked for."
        raise row.wrong("the last message is the assistant's", hint)
    return Prompt(row.line, messages=messages)


def tokens_of(
    prompts: Sequence[Prompt], talk: Conversation, sampling: Sampling, path: Path
) -> list[list[int]]:
    """Every prompt as the tokens that a model continues.

    Args:
        path: the file, for messages.

    Raises:
        SourceError: a prompt that the model cannot be asked, with its line.
    """
    tokens = []
    for prompt in prompts:
        try:
            if prompt.messages:
                tokens.append(talk.messages(prompt.messages, sampling))
            else:
                tokens.append(talk.prompt(prompt.text, sampling)[0])
        except MergeCliError as error:
            message = f"line {prompt.line}: {error.message}"
            raise SourceError(message, model=talk.label, file=str(path), hint=error.hint) from None
    return tokens


def answers(
    tokens: Sequence[Sequence[Sequence[int]]], models: Sequence[LiveModel], sampling: Sampling
) -> Iterator[list[Answer]]:
    """The answers of every model to each prompt, in the order of the file.

    Args:
        tokens: for every model those of every prompt, by `tokens_of`.
    """
    for prompt in zip(*tokens, strict=True):
        yield [answer(live, ids, sampling) for live, ids in zip(models, prompt, strict=True)]
