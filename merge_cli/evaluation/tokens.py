"""Tokenising texts, and which of their tokens count; nothing else in the package tokenises.

A prompt and its completion are tokenised *together*, as the model will read them. Separately, a
tokenizer that adds a word mark to every text (SentencePiece: Llama 2, Mistral, T5) would put one in
the middle, and one that merges across the boundary would not do so. The offsets of the tokens in
the text show where the completion begins; a token on both sides of the boundary belongs to the
completion.

Special tokens are added before a text, never after it, and not to a text that begins with them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Part of cache keys: grows when a text becomes other tokens.
TOKENISATION = 2

Truncate = Literal["left", "right", "refuse"]
_PROBES = ("a", "1", "the", "。")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row.

    Attributes:
        first: the first token that counts, never 0, which nothing predicts.
        text: to be predicted.
    """

    ids: Sequence[int]
    first: int
    text: str = ""


def encode_pair(prompt: str, completion: str, tokenizer: Any, start: Sequence[int] = ()) -> Encoded:
    """Tokens of a prompt and its completion, of which the completion's count.

    Args:
        start: special tokens before the text; left out where the text begins with them.
    """
    text = prompt + completion
    ids, ends = _tokenised(text, tokenizer)
    if not prompt:
        skipped = 0
    elif not completion:
        skipped = len(ids)
    elif ends is not None:
        skipped = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    else:
        skipped = _common_length(ids, _tokenised(prompt, tokenizer)[0])
    before = [] if begins_with(ids, start) else list(start)
    first = len(before) + skipped
    if first == 0 and ids:  # nothing comes before the first token, so that nothing predicts it
        end = ends[0] if ends is not None else len(tokenizer.decode(ids[:1]))
        completion = text[max(end, len(prompt)) :]
    return Encoded([*before, *ids], max(1, first), completion)


def begins_with(ids: Sequence[int], start: Sequence[int]) -> bool:
    """Whether a text begins with the special tokens, which a chat template may have written."""
    return bool(start) and list(ids[: len(start)]) == list(start)


def row_start(tokenizer: Any) -> list[int]:
    """Tokens before a row: those that the tokenizer adds, else its BOS token if it has one."""
    start = own_start(tokenizer)
    if start or tokenizer.bos_token_id is None:
        return start
    return [int(tokenizer.bos_token_id)]


def own_start(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer adds before a text."""
    return _around(tokenizer)[0]


def without_ending(tokenizer: Any) -> Any:
    """A tokenizer that adds nothing after a text, for programs that tokenise by themselves.

    Otherwise a completion would come after the end token of its prompt.
    """
    before, after = _around(tokenizer)
    if not after or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    copied = copy.deepcopy(tokenizer)
    names = [copied.convert_ids_to_tokens(number) for number in before]
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(dict(zip(names, before, strict=True)).items())
    )
    return copied


def fitted(encoded: Encoded, limit: int, side: Truncate) -> Encoded | None:
    """A row whose prompt is cut so that the row has at most `limit` tokens; None to refuse.

    The completion is not cut: if it is longer than `limit`, so is the row.

    Args:
        side: which end of the prompt is cut: its beginning (left) or its end (right).
    """
    over = len(encoded.ids) - limit
    if over <= 0:
        return encoded
    if side == "refuse":
        return None
    # One token stays before those that count, to predict the first of them.
    least = 1 if encoded.first < len(encoded.ids) else 0
    cut = min(over, encoded.first - least)
    first, ids = encoded.first - cut, list(encoded.ids)
    shortened = ids[cut:] if side == "left" else [*ids[:first], *ids[encoded.first :]]
    return Encoded(shortened, max(1, first), encoded.text)


def too_long(length: int, limit: int) -> tuple[str, str]:
    """Message and hint for a row that is too long and may not be cut."""
    message = f"has {length:,} tokens, and there is room for {limit:,}"
    return message, "Use `truncate: left` or `right`, or a larger max_length."


def first_unknown(ids: Sequence[int], entries: int) -> int | None:
    """The first id that a model with so many embeddings does not have."""
    return next((number for number in ids if not 0 <= number < entries), None)


def _tokenised(text: str, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """Ids without special tokens, and where each ends in the text; None where that is unknown."""
    if not text:
        return [], []
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)), None
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
        truncation=False,
        padding=False,
    )
    ids, ends = list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]
    # A hand-made tokenizer may have no offsets; then the prompt's own tokens are used.
    has_offsets = not ids or 0 < max(ends) <= len(text)
    return ids, ends if has_offsets else None


def _common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after a text."""
    for probe in _PROBES:
        bare = list(tokenizer.encode(probe, add_special_tokens=False))
        complete = list(tokenizer.encode(probe, add_special_tokens=True))
        for i in range(len(complete) - len(bare) + 1 if bare else 0):
            if complete[i : i + len(bare)] == bare:
                return complete[:i], complete[i + len(bare) :]
    return [], []
