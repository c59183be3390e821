"""The documentation as a site: it builds strictly, its links lead somewhere, it is up to date."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from merge_cli.methods.registry import all_methods
from tests.support.paths import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Links(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.anchors.add(found["id"] or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        elif tag in ("script", "img") and found.get("src"):
            self.loaded.append(found["src"] or "")
        elif tag == "link" and found.get("rel") == "stylesheet":
            self.loaded.append(found["href"] or "")


def test_links_lead_somewhere(site: Path) -> None:
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert len(pages) > 30
    checked = 0
    for page, found in pages.items():
        if page.name == "404.html":  # its links are absolute, for wherever it is shown
            continue
        for link in (*found.links, *found.loaded):
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page}: {link}"
            if url.fragment and not url.fragment.startswith("__"):
                assert unquote(url.fragment) in pages[target].anchors, f"{page}: {link}"
            checked += 1
    assert checked > 1000


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = Links(page.read_text(encoding="utf-8")).loaded
        assert not [address for address in loaded if urlsplit(address).netloc]


def test_every_method_has_a_page_with_its_parameters(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for method in all_methods():
        text = (site / "methods" / method.name / "index.html").read_text(encoding="utf-8")
        for name in method.parameters:
            assert f"<code>{name}</code>" in text, (method.name, name)
        assert f"configs/{method.name}" in text  # its example
        assert f"methods/{method.name}/" in home  # in the navigation


def test_every_command_is_there(site: Path) -> None:
    from merge_cli.cli import app

    text = (site / "commands" / "index.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__.replace("_", "-")
        assert f"merge-cli {name}" in text
    for option in ("--dry-run", "--max-memory", "--require-no-worse-than"):
        assert f"<code>{option}</code>" in text
    assert "--lazy-unpickle" not in text  # hidden


def copied(root: Path) -> Path:
    """A checkout whose texts may be changed."""
    for name in ("docs", "scripts/docs"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root / name)
    for name in ("zoo", "configs", "merge_cli"):
        (root / name).symlink_to(ROOT / name)
    return root


def test_a_new_page_is_found(tmp_path: Path) -> None:
    root = copied(tmp_path / "root")
    (root / "docs" / "brand-new.md").write_text("# Brand new\n")
    done = build(root, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    home = Links((tmp_path / "site" / "index.html").read_text(encoding="utf-8"))
    assert "brand-new/" in home.links


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ("[nowhere](nowhere.md)", "nowhere.md"),
        ("[no such part](recipes.md#no-such-part)", "no-such-part"),
        ("[no such file](../merge_cli/none.py)", "none.py"),
    ],
)
def test_a_broken_link_breaks_the_build(tmp_path: Path, wrong: str, word: str) -> None:
    root = copied(tmp_path / "root")
    page = root / "docs" / "quickstart.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{wrong}\n", encoding="utf-8")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0
    assert word in done.stderr
