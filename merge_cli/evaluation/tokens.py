"""Texts to token ids, and which of them count: the one place where anything is tokenised.

A prompt and its completion are tokenised *together*, as the model will read them. Apart, a
tokenizer that writes a word mark before every text (SentencePiece: Llama 2, Mistral, T5) puts one
in the middle, which no text has, and one that merges across the seam never does. Where the
completion begins is found by the offsets of the tokens in the text; a token that covers both sides
of the seam belongs to the completion.

Special tokens are put before a text, never behind it, and not before a text that begins with them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

# In the keys of results and predictions that are kept: grows when a text becomes other tokens.
TOKENISATION = 2

Truncate = Literal["left", "right", "refuse"]
_PROBES = ("a", "1", "the", "。")


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


def encode_pair(prompt: str, completion: str, tokenizer: Any, start: Sequence[int] = ()) -> Encoded:
    """Tokens of a prompt and its completion, of which the completion's count.

    Args:
        start: special tokens before the text; left out where the text begins with them.
    """
    whole = prompt + completion
    ids, ends = _tokenised(whole, tokenizer)
    if not prompt:
        own = 0
    elif not completion:
        own = len(ids)
    elif ends is not None:
        own = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    else:
        own = _common(ids, _tokenised(prompt, tokenizer)[0])
    before = [] if begins_with(ids, start) else list(start)
    first = len(before) + own
    if first == 0 and ids:  # nothing comes before the first token, so that nothing predicts it
        end = ends[0] if ends is not None else len(tokenizer.decode(ids[:1]))
        completion = whole[max(end, len(prompt)) :]
    return Encoded([*before, *ids], max(1, first), completion)


def begins_with(ids: Sequence[int], start: Sequence[int]) -> bool:
    """Whether a text brings the special tokens itself; a template renders them, for example."""
    return bool(start) and list(ids[: len(start)]) == list(start)


def row_start(tokenizer: Any) -> list[int]:
    """What a row begins with: what the tokenizer puts before a text, else its BOS token if any."""
    result = own_start(tokenizer)
    if result or tokenizer.bos_token_id is None:
        return result
    return [int(tokenizer.bos_token_id)]


def own_start(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer itself puts before a text."""
    return _around(tokenizer)[0]


def without_ending(tokenizer: Any) -> Any:
    """A tokenizer that puts nothing behind a text: what follows a prompt would follow its end.

    Programs that tokenise by themselves get this one; it is the same one where nothing is to do.
    """
    before, behind = _around(tokenizer)
    if not behind or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    result = copy.deepcopy(tokenizer)
    names = [result.convert_ids_to_tokens(number) for number in before]
    result.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(dict(zip(names, before, strict=True)).items())
    )
    return result


def fitted(encoded: Encoded, room: int, how: Truncate) -> Encoded | None:
    """A row whose prompt is cut so that the whole has at most `room` tokens; None to refuse.

    The completion is not cut: with one that is longer than `room` the whole is, too.

    Args:
        how: where the prompt loses tokens, at its beginning (left) or at its end (right).
    """
    over = len(encoded.ids) - room
    if over <= 0:
        return encoded
    if how == "refuse":
        return None
    # Where some tokens count, one stays before them: nothing else predicts the first.
    least = 1 if encoded.first < len(encoded.ids) else 0
    cut = min(over, encoded.first - least)
    first, ids = encoded.first - cut, list(encoded.ids)
    kept = ids[cut:] if how == "left" else [*ids[:first], *ids[encoded.first :]]
    return Encoded(kept, max(1, first), encoded.text)


def too_long(length: int, room: int) -> tuple[str, str]:
    """What to say of a row that is not to be cut, and what to do."""
    message = f"has {length:,} tokens, and there is room for {room:,}"
    return message, "Use `truncate: left` or `right`, or a larger max_length."


def beyond(ids: Sequence[int], entries: int) -> int | None:
    """The first id that a model with so many embeddings does not have."""
    return next((number for number in ids if not 0 <= number < entries), None)


def _tokenised(text: str, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """Ids without special tokens around them, and where each ends in the text, if that is known."""
    if not text:
        return [], []
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)), None
    result = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
        truncation=False,
        padding=False,
    )
    ids, ends = list(result["input_ids"]), [end for _, end in result["offset_mapping"]]
    # A tokenizer that was made by hand may not keep track; then the prompt's own tokens must do.
    known = not ids or 0 < max(ends) <= len(text)
    return ids, ends if known else None


def _common(ids: Sequence[int], own: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = zip(ids, own, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(own)))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and behind it."""
    for probe in _PROBES:
        bare = list(tokenizer.encode(probe, add_special_tokens=False))
        whole = list(tokenizer.encode(probe, add_special_tokens=True))
        for i in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[i : i + len(bare)] == bare:
                return whole[:i], whole[i + len(bare) :]
    return [], []
