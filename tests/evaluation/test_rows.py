"""Data rows that are not as they should be: a message with file and line, whatever it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from merge_cli.errors import SourceError
from merge_cli.evaluation.rows import Row, content_of, distinct, encode, make_row, read_rows
from merge_cli.system import notices


class Bytes:
    """A tokenizer of bytes with a chat template, for rows that must not get that far."""

    bos_token_id = None
    is_fast = False
    chat_template = "x"

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return "".join(f"[{one['role']}]{one['content']}" for one in messages)


def row_of(**fields: Any) -> Row:
    return make_row(1, fields, Path("rows.jsonl"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a JSON object but a list"),
        ("null", "is not a JSON object but null"),
        ('{"text": %s}' % ("9" * 400), "a number of 400 digits"),
        ('{"text": %s}' % ("[" * 5000 + "]" * 5000), "nests deeper"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": 3}', "needs 'text', a text (got the number 3)"),
        ('{"text": null}', "has neither text nor completion nor messages (it has nothing)"),
        ('{"text": ["a"]}', "needs 'text', a text (got a list)"),
        ('{"prompt": 1, "completion": "x"}', "needs 'prompt', a text"),
        ('{"prompt": "x", "completion": null}', "has neither text"),
        ('{"messages": "hi"}', "'messages' must be a list of at least two (got the text 'hi')"),
        ('{"messages": [1, 2]}', "message 1 is not a mapping"),
        ('{"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}', "needs 'role'"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": 3}]}', "needs 'role'"),
        ('{"messages": [{"role": "a"}, {"role": "b"}]}', "the chat template refuses it"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')

    def read() -> None:
        for row in read_rows(path):
            encode(row, Bytes())

    with pytest.raises(SourceError) as caught:
        read()
    assert what in str(caught.value)
    assert "line 3" in str(caught.value)
    assert str(path) in str(caught.value)


def test_null_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null, "messages": null, "prompt": "a", "completion": "b"}\n'
                    '{"prompt": null, "completion": "b"}\n')  # fmt: skip
    first, second = read_rows(path)
    assert first.fields == {"prompt": "a", "completion": "b"}
    assert encode(first, Bytes()).ids == [97, 98]
    assert encode(second, Bytes()).ids == [98]


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, what in (
        ("pipe.jsonl", "not a regular file"), ("bytes.jsonl", "is not UTF-8 text"),
        ("empty.txt", "has no rows"), ("gone.jsonl", "no such data file"),
        ("bytes.jsonl/x", "no such data file"), (".", "cannot be read"), ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=what):
            read_rows(tmp_path / name)


def test_a_token_that_the_model_lacks() -> None:
    class Numbers(Bytes):
        def convert_ids_to_tokens(self, number: int) -> str:
            return chr(number)

    assert encode(row_of(text="abc"), Numbers(), entries=100).ids == [97, 98, 99]
    with pytest.raises(SourceError, match="its token 'c' has the number 99, and the model 99"):
        encode(row_of(text="abc"), Numbers(), entries=99)


@pytest.mark.parametrize(
    ("fields", "pair", "told"),
    [
        ({"text": "t", "completion": "c"}, ("", "c"), ["'completion' and 'text'"]),
        ({"text": "t", "prompt": "p", "completion": "c"}, ("p", "c"), ["'completion' and 'text'"]),
        ({"text": "t", "prompt": "p"}, ("", "t"), ["'text' and 'prompt'"]),
        ({"prompt": "p", "completion": "c"}, ("p", "c"), []),
        ({"text": "t", "id": 3}, ("", "t"), []),
        ({"text": "t", "completion": None}, ("", "t"), []),
    ],
)
def test_which_of_several_forms_counts_is_told_once(
    fields: dict[str, Any], pair: tuple[str, str], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = told_by(monkeypatch)
    for line in (1, 2):
        assert make_row(line, fields, Path("rows.jsonl")).pair() == pair
    notices.send_notices(None)
    assert said == [f"rows.jsonl: of rows with {words}, only {words.split()[0]} counts"
                    for words in told]  # fmt: skip


def test_a_conversation_counts_before_all(monkeypatch: pytest.MonkeyPatch) -> None:
    said = told_by(monkeypatch)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = make_row(1, {"messages": messages, "text": "t", "completion": "c"}, Path("rows.jsonl"))
    assert row.messages() == messages
    row.require_text()
    notices.send_notices(None)
    assert len(said) == 2
    assert all("only 'messages' counts" in line for line in said)


def told_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said once, from now on."""
    said: list[str] = []
    monkeypatch.setattr(notices, "_given", {})
    notices.send_notices(said.append)
    return said


def test_the_same_row() -> None:
    """White space, Unicode's composition, form and other fields do not make another row."""
    turn = [{"role": "user", "content": "caf\u00e9 au"}, {"role": "assistant", "content": "lait"}]
    same = [
        row_of(text="café au lait"),
        row_of(text="  cafe\u0301\tau\u00a0\n lait ", id=7),
        row_of(prompt="caf", completion="é au lait", source="x"),
        row_of(prompt="café au", answer="lait"),
        row_of(messages=turn),
    ]
    assert len(distinct(same)) == 1
    other = [row_of(text="cafe au lait"), row_of(text="café au lait!"), row_of(text="caféaulait")]
    assert len(distinct([*same, *other])) == 4


def test_questions_are_the_same_however_answered() -> None:
    one = row_of(prompt="x", choices=["a", "b"], answer=0)
    assert content_of(one) == content_of(row_of(prompt="x ", choices=["a", "b"], answer="A"))
    assert content_of(one) != content_of(row_of(prompt="x", choices=["a", "c"], answer=0))
    # What says nothing that is known is told apart by all it has.
    assert content_of(row_of(id=1)) != content_of(row_of(id=2))
