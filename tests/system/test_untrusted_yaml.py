"""YAML of somebody else's: every mistake is a sentence with a place, and nothing expands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from merge_cli.errors import RecipeError, UsageError
from merge_cli.recipe.load import read_recipe
from merge_cli.recipe.nodes import load_nodes
from merge_cli.system.untrusted import Unreadable
from merge_cli.system.untrusted_yaml import MAX_YAML, read_front


def bomb(first: str, item: str, opening: str, closing: str, levels: int = 9) -> str:
    lines = [f"a0: &a0 {first}"]
    for i in range(1, levels):
        inner = ", ".join([item.format(i - 1)] * 9)
        lines.append(f"a{i}: &a{i} {opening}{inner}{closing}")
    return "\n".join(lines)


BOMBS = {
    "lists": bomb("[x, y]", "*a{}", "[", "]"),
    "merges": bomb("{x: 1}", "*a{}", "{<<: [", "]}"),
    "keys": bomb("[x, y]", "*a{}", "[", "]", 4) + "\nb: {? [*a3, *a3, *a3, *a3] : 1}" * 200,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_aliases_do_not_expand(text: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError):
        load_nodes(text, "r.yaml")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: " + "[" * 200, "not valid YAML: it nests deeper than 64 levels"),
        ("- " * 500 + "x", "not valid YAML: it nests deeper than 64 levels"),
        ("a: &x [1, *x]", "r.yaml:1:11: not valid YAML: an alias that contains itself"),
        ("a: 1\nb: \x07", "r.yaml:2:4: not valid YAML: the character U+0007"),
        ('a: [1, "\\e[31m"]', "r.yaml:1:8: a[1]: the text holds a control character (U+001B)"),
        ('"a\\0": 1', "r.yaml:1:1: a key holds a control character (U+0000)"),
        ('a: {b: "\\udc00"}', "r.yaml:1:8: a.b: the text holds half of a surrogate pair (U+DC00)"),
        ("a: !!bool maybe", "r.yaml:1:4: a: not a valid value: 'maybe' is no !!bool"),
        ("a: !!int ''", "r.yaml:1:4: a: not a valid value: '' is no !!int"),
        ("a: !!float x", "a: not a valid value: could not convert string to float: 'x'"),
        ("a: !!timestamp x", "a: not a valid value: 'x' is no !!timestamp"),
        ("a: 2024-13-45", "a: not a valid value: month must be in 1..12"),
        ("a: !!binary YQ==", "a: not a valid value: nothing here is of the kind !!binary"),
        ("a: !!set {x}", "a: an unknown tag, !!set"),
        ("a: !!python/tuple [1]", "a: an unknown tag, !!python/tuple"),
        ("a: !!python/object/apply:os.system [id]", "a: an unknown tag, !!python/object/apply"),
        ("a: !mine x", "a: an unknown tag, !mine"),
        ("a: =", "a: an unknown tag, !!value"),
        ("a: .inf", "a: not a finite number: .inf"),
        ("a: [-.INF, .NaN]", "a[1]: not a finite number: .NaN"),
        ("a: " + "9" * 41, "a: a number of more than 40 digits"),
        ("a: -" + "9" * 6000, "a: a number of more than 40 digits"),
        ("a: " + ":".join(["1"] * 30), "a: a number of more than 40 digits"),  # sexagesimal
        ("a: 12:30", "r.yaml:1:4: a: 12:30 is 750 to YAML, which counts in sixties"),
        ("a: {b: [-190:20:30]}", "a.b[0]: -190:20:30 is -685230 to YAML"),
        ("a: 1:30.5", "a: 1:30.5 is 90.5 to YAML"),
        ("a: !!float '1:30'", "a: 1:30 is 90.0 to YAML"),
        ("a: 010", "a: 010 is 8 to YAML, which counts in eights after a leading 0"),
        ("a: -0_17", "a: -0_17 is -15 to YAML"),
        ("a: !!int '010'", "a: 010 is 8 to YAML"),
        ("? [a, b]\n: 1", "r.yaml:1:3: a key must be text, and this is a list or a mapping"),
        ("<<: 3", "not valid YAML: expected a mapping or list of mappings for merging"),
        ("a: 1\x85b: \x9f", "not valid YAML: the character U+009F"),
    ],
)
def test_each_mistake_has_a_place(text: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_nodes(text, "r.yaml")
    assert what in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_nodes("a: !!bool x\nb: {c: .nan}\n", "r.yaml")
    assert [problem.key for problem in caught.value.problems] == ["a", "b.c"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-0", 0), ("00", 0), ("007", 7), ("1_000", 1000), ("0x1F", 31), ("0b11", 3),
        ("1e-1", "1e-1"), ("1e3", "1e3"), ("1.5e+2", 150.0), (".5", 0.5), ("5.", 5.0),
        ("010.5", 10.5), ("08", "08"), ("0o10", "0o10"), ("0:10", "0:10"), ("'12:30'", "12:30"),
        ('"010"', "010"), ("12:30 h", "12:30 h"), ("1:2:x", "1:2:x"),
    ],
)  # fmt: skip
def test_numbers_are_what_their_reader_takes_them_for(text: str, value: object) -> None:
    read = load_nodes(f"a: {text}", "r.yaml")[0].plain()["a"]
    assert (read, type(read)) == (value, type(value))


def test_what_is_written_every_day_is_read() -> None:
    text = "a: &x {b: 1e-3, c: 0x10, d: null}\ne: {<<: *x, f: 'naïve 🙂'}\ng: [~, yes, 3.0]\n"
    assert load_nodes(text, "r.yaml")[0].plain() == {
        "a": {"b": "1e-3", "c": 16, "d": None},
        "e": {"b": "1e-3", "c": 16, "d": None, "f": "naïve 🙂"},
        "g": [None, True, 3.0],
    }


def test_recipes_that_are_no_files(tmp_path: Path) -> None:
    for path, what in [
        (Path("/dev/zero"), "the recipe is larger than"),
        (tmp_path, "the recipe cannot be read: Is a directory"),
        (tmp_path / ("r" * 300), "the recipe cannot be read: File name too long"),
        (tmp_path / "none.yaml", "no such recipe"),
    ]:
        with pytest.raises(UsageError, match=what):
            read_recipe(path)
    long = tmp_path / "long.yaml"
    long.write_text("a: " + "x" * MAX_YAML)
    with pytest.raises(RecipeError, match="more than 524288 characters"):
        read_recipe(long)
    long.write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match="the recipe is not UTF-8 text"):
        read_recipe(long)


def test_front_matter_stays_text_and_is_bounded() -> None:
    assert read_front("language: no\nn: 1\nd: 2024-13-45") == {
        "language": "no", "n": "1", "d": "2024-13-45"
    }  # fmt: skip
    for text in (*BOMBS.values(), "a: " + "[" * 5000, "? [a]\n: 1", "a: \x01", "a: *b",
                 "x" * (MAX_YAML + 1), "- a\nb"):  # fmt: skip
        with pytest.raises(Unreadable):
            read_front(text)
