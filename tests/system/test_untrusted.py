"""The guarded reader: bounds hold for inputs that nobody listed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_cli.errors import CorruptFileError
from merge_cli.system.untrusted import (
    MAX_DEPTH,
    MAX_DIGITS,
    Unreadable,
    parse_json,
    plain_json,
    read_bytes,
    read_json,
    read_mapping,
    read_text,
    whole_number,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab\u00e9"), inner),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reads_what_json_reads(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_anything_else_is_one_error(text: bytes | str) -> None:
    with contextlib.suppress(Unreadable):  # nothing else is raised
        parse_json(text)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 5_000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth(depth: int, opening: str, closing: str) -> None:
    with pytest.raises(Unreadable, match="nests deeper"):
        parse_json(opening * depth + "1" + closing * depth)


def test_the_deepest_that_is_read() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


def test_digits() -> None:
    assert parse_json("1" * MAX_DIGITS) == int("1" * MAX_DIGITS)
    for digits in (MAX_DIGITS + 1, 400, 5_000, 10**6):
        with pytest.raises(Unreadable, match="digits"):
            parse_json("[" + "9" * digits + "]")


def test_surrogates() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    for text in ('"\\ud800"', b'["\\uDfff"]', '{"\\udc00": 1}'):
        with pytest.raises(Unreadable, match="surrogate"):
            parse_json(text)


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    started = time.monotonic()
    with pytest.raises(CorruptFileError, match=r"regular file.*config\.json"):
        read_json(tmp_path / "config.json")
    for path in (
        Path("/dev/zero"),
        tmp_path,
        tmp_path / "none",
        Path("a\0b"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(Unreadable):
            read_bytes(path)
    assert time.monotonic() - started < 5, "it waited for somebody to write"


def test_size_and_text(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_text(file) == "[1]"
    assert read_json(file) == [1]
    with pytest.raises(CorruptFileError, match="not a mapping but a list"):
        read_mapping(file)
    with pytest.raises(Unreadable, match="larger than"):
        read_bytes(file, limit=5)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(Unreadable, match="UTF-8"):
        read_text(file)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_every_encoding_of_json(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "file.json"
    file.write_text('{"ö": 1}', encoding=encoding)
    assert read_mapping(file) == {"ö": 1}
    assert plain_json(file.read_bytes()) == '{"ö": 1}'.encode()
    file.write_bytes(file.read_bytes() + b"\xff")
    with pytest.raises(CorruptFileError, match="is not .* text"):
        read_json(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": [0, {"b": NaN}]}', r"a\[1\].b is NaN"),
        ('{"a": NaN }', "a is NaN"),
        ('{"rms_norm_eps": 1e999}', "rms_norm_eps is infinite"),
        ('{"rms_norm_eps": -Infinity}', "rms_norm_eps is infinite"),
        ('{"rms_norm_eps": ' + "9" * 400 + ".0}", "rms_norm_eps is infinite"),
        ('{"rms_norm_eps": ' + "9" * 290 + "e20}", "rms_norm_eps is infinite"),
        ('{"rms_norm_eps": 0.5E+0400}', "rms_norm_eps is infinite"),
        ('{"time_step_limit": [0.0, NaN]}', r"time_step_limit\[1\] is NaN"),
        ("[Infinity]", r"\[0\] is infinite"),
        ("NaN", "it is NaN"),
    ],
)
def test_what_is_no_number_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CorruptFileError, match=f"{words}.*mine, config.json"):
        read_json(tmp_path / "config.json", "mine")


@pytest.mark.parametrize(
    "text",
    [
        '{"time_step_limit": [0.0, Infinity]}',  # Mamba 2, Bamba, Falcon H1
        '{"model_max_length": Infinity, "min": -Infinity}',
        '{"NaN": "NaN", "tokens": ["NaN", "a NaN, b", "Infinity]", "1e999"]}',
        '{"a": 1e100, "b": 1e-999}',
    ],
)
def test_numbers_that_only_look_odd(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert read_json(tmp_path / "config.json") == json.loads(text)


@pytest.mark.parametrize("value", [-1, 11, True, None, 1.0, "3", [], {}, 2**63, float("inf")])
def test_numbers(value: object) -> None:
    with pytest.raises(Unreadable, match="size must be"):
        whole_number(value, "size", most=10)
    assert whole_number(10, "size", most=10) == 10
