"""A page of HTML, read strictly."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """The tags of a page, which must nest; and the text a reader sees, tooltips apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None], str | None]] = []  # with the parent
        self.texts: list[str] = []
        self.tooltips: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), self.stack[-1] if self.stack else None))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), self.stack[-1] if self.stack else None))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "title" in self.stack:
            self.tooltips.append(data)
        elif "style" not in self.stack:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts).replace("\u00a0", " ")

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _, _ in self.tags)
