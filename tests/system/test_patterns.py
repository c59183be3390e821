"""Expressions of somebody else's: the same answers as `re`, in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time

import pytest

from merge_cli.system import patterns
from merge_cli.system.patterns import compile_pattern
from merge_cli.system.untrusted import Unreadable

LEAVES = ["a", "b", ".", "[ab]", "[^a]", r"\d", "^", "$", r"\b", r"\w", "(?i:A)", r"\Z"]
EXPLODING = ["(a+)+$", "(a|a)*b", ".*.*.*.*.*x", "(.*a){20}$", "(a?){40}a{40}b", "((a*)*)*c"]


def expression(random: random.Random, depth: int = 0) -> str:
    """A random expression whose loops never repeat nothing."""
    kind = random.random()
    if depth > 3 or kind < 0.35:
        return random.choice(LEAVES)
    inner = expression(random, depth + 1)
    if kind < 0.55:
        return inner + expression(random, depth + 1)
    if kind < 0.65:
        return f"(?:a{inner})" + random.choice(["*", "+", "*?", "+?", "{1,2}", "{2}", "{0,3}?"])
    if kind < 0.7:
        return f"(?:{inner})" + random.choice(["?", "??"])
    if kind < 0.8:
        return f"({inner})"
    if kind < 0.9:
        return f"(?:{inner}|{expression(random, depth + 1)})"
    return random.choice(["(?=", "(?!"]) + inner + ")"


def test_finds_what_re_finds() -> None:
    draw = random.Random(0)
    compared = 0
    for _ in range(1500):
        source = expression(draw)
        plain, ours = re.compile(source), compile_pattern(source)
        text = "".join(draw.choice("abcA1 ") for _ in range(draw.randint(0, 8)))
        for how in ("search", "match", "fullmatch"):
            theirs, found = getattr(plain, how)(text), getattr(ours, how)(text)
            spans = theirs and tuple(theirs.span(n) for n in range(plain.groups + 1))
            assert (found and found.spans) == spans, (how, source, text)
        theirs = [match.span() for match in plain.finditer(text)]
        assert [found.spans[0] for found in ours.finditer(text)] == theirs, (source, text)
        compared += 1
    assert compared == 1500


@pytest.mark.parametrize("source", EXPLODING)
def test_nothing_explodes(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.2)
    compile_pattern.cache_clear()
    pattern = compile_pattern(source)
    began = time.monotonic()
    with contextlib.suppress(Unreadable):  # or it is quickly found not to match
        assert pattern.search("a" * 300 + "!") is None
    with contextlib.suppress(Unreadable):
        assert list(pattern.finditer("a" * 300 + "!")) is not None
    for _ in range(1000):  # names of a model's modules: the limit is on all of them together
        with contextlib.suppress(Unreadable):
            pattern.match("a" * 60 + "!")
    assert time.monotonic() - began < 30, "hours without a limit"


def test_expressions_in_the_wild_are_matched() -> None:
    """As unsloth, ms-swift and PEFT write them into target_modules and alpha_pattern."""
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))"
    )
    assert compile_pattern(unsloth).fullmatch("model.layers.11.self_attn.q_proj")
    assert compile_pattern(unsloth).fullmatch("model.language_model.layers.0.mlp.down_proj")
    assert not compile_pattern(unsloth).fullmatch("model.visual.blocks.0.attn.qkv")
    swift = r"^(model\.language_model(?=\.).*\.(q_proj|k_proj))$"
    assert compile_pattern(swift).fullmatch("model.language_model.layers.1.self_attn.k_proj")
    without = r"^(?!.*(?:visual|merger)).*(?<=self_attn\.)(q|v)_proj$"
    assert compile_pattern(without).match("model.layers.0.self_attn.v_proj")
    assert not compile_pattern(without).match("model.visual.self_attn.v_proj")


def test_groups_are_those_of_re_however_it_is_matched() -> None:
    text = "so " * 900 + "the answer is 42 . "
    found = compile_pattern(r"(\w+) is (.*\d)(x)? .*\s*$").search(text)
    assert found is not None
    assert [found.group(n) for n in (1, 2, 3)] == ["answer", "42", None]
    assert found.group() == "answer is 42 . "
    assert (found.start, found.end) == (text.index("answer"), len(text))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("(a", "is not a regular expression: missing ), unterminated subpattern, at character 1"),
        ("a{99999999999999999999}", "is not a regular expression: the repetition number"),
        ("(" * 5000 + ")" * 5000, "is not a regular expression: it nests too deep"),
        ("a" * 100_001, "is an expression of 100001 characters"),
    ],
)
def test_what_is_none_is_refused(source: str, what: str) -> None:
    with pytest.raises(Unreadable) as caught:
        compile_pattern(source)
    assert what in str(caught.value)


def test_an_expression_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.1)
    compile_pattern.cache_clear()
    pattern = compile_pattern(r"(a|aa)+$")
    with pytest.raises(Unreadable, match="takes too long"):
        pattern.search("a" * 3000 + "!")
    with pytest.raises(Unreadable, match="takes too long"):  # nor again
        pattern.search("a" * 3000 + "!")
    compile_pattern.cache_clear()
