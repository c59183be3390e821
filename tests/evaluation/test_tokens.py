"""Prompt and completion as tokens, for every kind of tokenizer, against naive ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.evaluation.tokens import (
    Encoded,
    encode_pair,
    fitted,
    own_start,
    row_start,
    without_ending,
)
from tests.support.tokenizer_kinds import KINDS, byte_level, metaspace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PIECES = st.lists(
    st.sampled_from(["The", " cat", " ", "  ", "\n", "42", "é", "e\u0301", "\u0301", "😀", "👩",
                     "\u200d🚀", "日本", "語", ":", "<s>", "</s>", "x", "\t", "ﬁ"]),
    max_size=5,
).map("".join)  # fmt: skip


@cache
def tokenizer_of(kind: str) -> Any:
    return KINDS[kind]()


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompt=PIECES, completion=PIECES)
def test_tokens_are_those_of_the_whole_text(kind: str, prompt: str, completion: str) -> None:
    """Not a token more or less than the naive ones; a seam that no token of the prompt crosses."""
    tokenizer = tokenizer_of(kind)
    start = row_start(tokenizer)
    found = encode_pair(prompt, completion, tokenizer, start)
    ids = whole(tokenizer, prompt + completion)
    twice = start and ids[: len(start)] == start
    assert found.ids == (ids if twice else start + ids)
    assert found.first >= 1
    before = found.first - (len(found.ids) - len(ids))
    if not completion or not ids:
        assert before == len(ids) or before <= 1
        return
    if not tokenizer.is_fast:
        if "<" not in prompt + completion:  # bytes, one token each
            assert before == max(len(prompt.encode()), 1)
        return
    ends = [end for _, end in tokenizer(prompt + completion, add_special_tokens=False,
                                        return_offsets_mapping=True)["offset_mapping"]]  # fmt: skip
    if found.first > 1:  # else there is nothing before, and the first is not predicted
        assert all(end <= len(prompt) for end in ends[:before])
    if prompt and before < len(ids):
        assert ends[before] > len(prompt)


def test_no_mark_in_the_middle() -> None:
    """What tokenising apart puts there."""
    tokenizer = metaspace("always", "bos")
    found = encode_pair("Answer:", " 42", tokenizer, row_start(tokenizer))
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["<s>", "▁Answer:", "▁42"]
    assert found.first == 2
    apart = whole(tokenizer, "Answer:") + whole(tokenizer, "42")
    seam = encode_pair("Answer: ", "42", tokenizer, [])
    assert seam.ids == whole(tokenizer, "Answer: 42")
    assert len(apart) == len(seam.ids)
    assert seam.first == 1  # the token of the space and 42 is the completion's


def test_a_token_across_the_seam_is_the_completions() -> None:
    tokenizer = tokenizer_of("bytes")
    found = encode_pair("The c", "at", tokenizer)
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["The", "Ġcat"]
    assert found.first == 1
    # A prompt that is inside the first token: nothing predicts that one, and it is not counted.
    inside = encode_pair("Th", "e cat", tokenizer)
    assert (inside.first, inside.text) == (1, " cat")


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_around_a_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    before = own_start(tokenizer)
    bare, full = whole(tokenizer, "The cat"), tokenizer.encode("The cat")
    assert full[: len(before) + len(bare)] == before + bare
    cut = without_ending(tokenizer)
    if tokenizer.is_fast:
        assert cut.encode("The cat") == before + bare
    assert tokenizer.encode("The cat") == full, "the tokenizer itself is as it was"


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    for tokenizer in (metaspace("always", "both"), byte_level("bos"), byte_level("none")):
        start = row_start(tokenizer)
        assert start == [1]
        for prompt, completion in (("<s>The", " cat"), ("", "<s>The cat"), ("<s>", "The cat")):
            found = encode_pair(prompt, completion, tokenizer, start)
            assert list(found.ids).count(1) == 1
            assert found.ids[0] == 1
        assert list(encode_pair("The", " cat", tokenizer, start).ids).count(1) == 1


@pytest.mark.parametrize("prompt", [0, 1, 5, 9])
@pytest.mark.parametrize("completion", [0, 1, 3])
@pytest.mark.parametrize("room", [2, 4, 8, 20])
def test_only_prompts_are_cut(prompt: int, completion: int, room: int) -> None:
    ids = list(range(prompt + completion))
    row = Encoded(ids, max(1, prompt))
    counted = ids[row.first :]
    for how in ("left", "right"):
        found = fitted(row, room, how)
        assert found is not None
        assert list(found.ids[found.first :]) == counted
        assert len(found.ids) == min(len(ids), max(room, len(counted) + 1 if counted else room))
        kept = found.ids[: found.first] if counted else found.ids
        own = ids[: row.first] if counted else ids
        assert list(kept) == (own[len(own) - len(kept) :] if how == "left" else own[: len(kept)])
    refused = fitted(row, room, "refuse")
    assert (refused is None) == (len(ids) > room)
