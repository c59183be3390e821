"""The session in docs/python.md runs as it stands, and a notebook shows its results."""

from __future__ import annotations

import contextlib
import io
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from merge_cli.report.notebook import framed
from tests.support.documents import blocks
from tests.support.paths import ROOT


def test_the_session(tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    for name in ("configs", "zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for block in blocks("python", (ROOT / "docs" / "python.md").read_text()):
            exec(compile(block, "docs/python.md", "exec"), session)
    words = said.getvalue()
    assert "no such recipe" in words
    assert "Use " in words
    assert "Progress(stage='merge'" in words
    page = session["result"]._repr_html_()
    text = (tmp_path / "out" / "changes" / "merge_report.html").read_text()
    assert unescape(page.partition('srcdoc="')[2].rpartition('"')[0]) == text
    assert "<td>math</td><td>loss</td>" in session["evaluation"]._repr_html_()
    assert "iframe" in session["comparison"]._repr_html_()
    assert "task_arithmetic" in str(session["comparison"])


def test_a_page_that_is_gone_is_not_shown(tmp_path: Path) -> None:
    assert framed(tmp_path / "merge_report.html") is None
