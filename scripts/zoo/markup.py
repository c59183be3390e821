"""Turns a package's files into plain paragraphs: HTML pages, manual pages and Python sources.

Every reader takes the decoded text of one file and returns its paragraphs in order. What is
not running prose (tables, menus, link lists, synopses) is left out, because a model of this
size would spend its few parameters on it.
"""

import re
from html.parser import HTMLParser

_SPACES = re.compile(r"[ \t\r\n\u00a0]+")
# LibreOffice writes both key names, one of them hidden: "CommandCtrl". Keep "Ctrl".
_MAC_KEY = re.compile(r'<span hidden="true" id="MAC[^>]*>.*?</span>', re.S)


class _Prose(HTMLParser):
    """Collects the text of <p> and <h1>..<h6> that lie outside tables, menus and link lists."""

    kept = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6"})
    skipped_tags = frozenset({"head", "script", "nav", "aside", "header", "footer", "table"})
    skipped_classes = (
        "relatedtopics",
        "howtoget",
        "sphinxsidebar",
        "related",
        "toc",
        "navheader",
        "navfooter",
        "footer",
    )
    void = frozenset({"br", "img", "input", "meta", "link", "hr", "col", "base", "wbr", "source"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._skipping: list[str] = []  # the open tags since a skipped element began
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.void:
            if tag == "br":
                self.handle_data(" ")
            return
        classes = (dict(attrs).get("class") or "").split()
        if (
            self._skipping
            or tag in self.skipped_tags
            or (tag == "div" and any(name in self.skipped_classes for name in classes))
        ):
            self._skipping.append(tag)
        elif tag in self.kept:
            self._flush()
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            # Pages leave <p> and <li> open, so close back to the matching tag.
            if tag in self._skipping:
                while self._skipping.pop() != tag:
                    pass
        elif tag in self.kept:
            self._flush()

    def handle_data(self, data: str) -> None:
        if self._text is not None and not self._skipping:
            self._text.append(data)

    def _flush(self) -> None:
        if self._text is not None:
            text = _SPACES.sub(" ", "".join(self._text)).replace("¶", "").strip()
            if text:
                self.paragraphs.append(text)
        self._text = None


def html_paragraphs(source: str) -> list[str]:
    parser = _Prose()
    parser.feed(_MAC_KEY.sub("", source))
    parser.close()
    return parser.paragraphs


_ROFF_COMMENT = re.compile(r'\\["#].*')
_ROFF_FONT = re.compile(r"\\f(\[[^]]*\]|\(..|.)|\\s[-+]?\d+|\\[&/,^|:%c]|\\m\[[^]]*\]")
_ROFF_GLYPHS = {
    "(en": "-",
    "(em": "-",
    "(aq": "'",
    "(dq": '"',
    "(lq": '"',
    "(rq": '"',
    "(cq": "'",
    "(oq": "'",
    "(bu": "*",
    "(co": "(c)",
    "(ti": "~",
    "(ha": "^",
}
_ROFF_GLYPH = re.compile(r"\\(\(..|\[[^]]*\]|\*\(..|\*.)")
_ROFF_FONT_MACROS = frozenset({"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB"})


def _roff_text(line: str) -> str:
    line = _ROFF_FONT.sub("", _ROFF_COMMENT.sub("", line))
    line = _ROFF_GLYPH.sub(lambda match: _ROFF_GLYPHS.get(match[1], ""), line)
    return line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\", "")


def roff_paragraphs(source: str) -> list[str]:
    """Prose of a man(7) page. Tables, literal blocks and mdoc(7) pages are left out."""
    if ".Dd " in source:
        return []
    paragraphs: list[str] = []
    lines: list[str] = []
    closing = ""  # the request that ends the block we are leaving out

    def flush() -> None:
        text = _SPACES.sub(" ", " ".join(lines)).strip()
        if text:
            # Japanese is written without spaces between lines.
            paragraphs.append(re.sub(r"(?<=[\u3000-\u9fff]) (?=[\u3000-\u9fff])", "", text))
        lines.clear()

    for line in source.splitlines():
        request = line[1:].split(maxsplit=1) if line[:1] in (".", "'") else None
        name = request[0] if request else ""
        if closing:
            closing = "" if name == closing else closing
        elif request is None and line[:1] not in (".", "'"):
            if not line.strip():
                flush()
            lines.append(_roff_text(line))
        elif name in ("TS", "nf", "EX", "ig"):
            flush()
            closing = {"TS": "TE", "nf": "fi", "EX": "EE", "ig": "."}[name]
        elif name in _ROFF_FONT_MACROS and request and len(request) == 2:
            words = re.findall(r'"[^"]*"|\S+', _roff_text(request[1]))
            glue = "" if len(name) == 2 and name not in ("SM", "SB") else " "
            lines.append(glue.join(word.strip('"') for word in words))
        elif name in ("SH", "SS"):
            flush()
            if request and len(request) == 2:
                lines.append(_roff_text(request[1]).strip('"'))
                flush()
        elif name not in ("br", "ft", "hy", "nh", "ad", "na", "ne"):
            flush()
    flush()
    return paragraphs


def code_blocks(source: str) -> list[str]:
    """The runs of lines between blank lines, with trailing blanks removed."""
    blocks = re.split(r"\n[ \t]*\n", source.expandtabs(4))
    cleaned = ("\n".join(line.rstrip() for line in block.split("\n")) for block in blocks)
    return [block.strip("\n") for block in cleaned if block.strip()]
