"""Default ranges: allowed by their methods, and said beside each method in the docs."""

from __future__ import annotations

import re

import pytest

from merge_cli.evolve.defaults import DEFAULT_RANGES
from merge_cli.methods.registry import get_method
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
PARTS = re.split(r"(?m)^## (.*)$", PAGE)
SECTIONS = {
    name: text
    for title, text in zip(PARTS[1::2], PARTS[2::2], strict=True)
    for name in title.split(", ")
}
SAME_AS = {"linear": "soup", "dare_linear": "dare"}


@pytest.mark.parametrize("name", sorted(DEFAULT_RANGES))
def test_the_page_of_methods_says_what_is_searched(name: str) -> None:
    (text,) = re.findall(r"(?s)By default a search .*", SECTIONS[SAME_AS.get(name, name)])
    said = " ".join(text.split())
    for searched in DEFAULT_RANGES[name]:
        owner = get_method(name).parameters[searched.name]
        assert not owner.check(searched.low)
        assert not owner.check(searched.high)
        ends = f"from {searched.low:g} to {searched.high:g}{' (log)' if searched.log else ''}"
        assert re.search(f"`{searched.name}`[^;.]* {re.escape(ends)}", said), ends
