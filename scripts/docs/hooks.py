"""mkdocs' hooks: pages that are generated, and links that lead out of docs/.

The site has, besides docs/: the README as its first page, the other texts of the root, a page for
each method that is registered, and one of all commands. Links keep the form that works in a
checkout; here they are led to these pages, or to a copy of the file.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from command_page import command_page  # noqa: E402  # found by the line above
from method_pages import method_pages  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "zoo/README.md": "zoo.md",
    "zoo/smollm/README.md": "zoo_smollm.md",
    "zoo/data/NOTICE.md": "notice.md",
    "configs": "methods.md",
}
_ORIGINS = {page: origin for origin, page in PAGES.items() if origin.endswith(".md")}
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Methods' pages come into the navigation as they are registered, new texts at its end."""
    (section,) = [item["Methods"] for item in config.nav if "Methods" in item]
    section[1:1] = [{name: f"methods/{name}.md"} for name in method_pages()]
    listed = set(_pages(config.nav))
    docs = Path(config.docs_dir)
    here = (path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md")))
    more = [page for page in here if page not in listed]
    if more:
        config.nav.append({"More": more})
    return config


def _pages(nav: Any) -> Iterator[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(part)


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated, and copies of the files that pages link to."""
    texts = {page: (ROOT / origin).read_text("utf-8") for page, origin in _ORIGINS.items()}
    texts |= {f"methods/{name}.md": text for name, text in method_pages().items()}
    texts["commands.md"] = command_page()
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    for path in sorted(_linked(files)):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to where the site has them."""
    here = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        target = _target(here, match[1])
        return f"]({os.path.relpath(target, os.path.dirname(here) or '.')}{match[2] or ''})"

    return _LINK.sub(led, markdown)


def _target(page: str, link: str) -> str:
    """The site's own path of what a page's link means."""
    origin = _ORIGINS.get(page, f"docs/{page}")
    path = os.path.normpath(os.path.join(os.path.dirname(origin), link))
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def _linked(files: Files) -> set[str]:
    """Files of the repository that pages link to and that are no pages of the site."""
    found = set()
    for file in files.documentation_pages():
        for match in _LINK.finditer(file.content_string):
            target = _target(file.src_uri, match[1])
            if target.startswith("source/") and (ROOT / target.removeprefix("source/")).is_file():
                found.add(target.removeprefix("source/"))
    return found
