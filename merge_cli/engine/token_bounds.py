"""Token numbers of somebody else's files, before they become rows of an embedding.

    0 <= number < rows + tokens      no two tokens of one number

A tokenizer may have tokens that the embedding has no rows for; numbered one after another they
stay within that bound, and lists of rows stay as short as the model and its tokenizer are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.source import Source
from merge_cli.errors import CorruptFileError
from merge_cli.guarded import Unreadable, whole_number


def check_numbers(source: Source, tokens: Mapping[Any, Any], rows: int) -> None:
    """Hold a tokenizer's numbers against the model's embedding.

    Args:
        rows: of the embedding.

    Raises:
        CorruptFileError: a number that can be no row's, or two tokens of one number.
    """
    most = rows + len(tokens) - 1
    seen: dict[int, Any] = {}
    for token, number in tokens.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number <= most:
            _refuse(source, token, number, most)
        if seen.setdefault(number, token) is not token:
            what = f"its tokenizer gives {_shown(seen[number])} and {_shown(token)} one number"
            hint = "Rows cannot be told apart by token. Correct the tokenizer's files."
            raise CorruptFileError(f"{what}, {number}", model=source.label, hint=hint)


def _refuse(source: Source, token: Any, number: Any, most: int) -> None:
    try:
        whole_number(number, f"the number of {_shown(token)}", most=most)
        what = f"a token must be text (got {_shown(token)})"
    except Unreadable as error:
        what = str(error)
    hint = "Its embedding has no such row. Correct the tokenizer's files."
    raise CorruptFileError(f"in its tokenizer, {what}", model=source.label, hint=hint) from None


def _shown(token: Any) -> str:
    return repr(str(token)[:40])
