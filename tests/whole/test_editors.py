"""What an editor shows: yaml-language-server on recipes, with the schema that `init` writes.

`make test` installs the server from npm where npm is; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_cli.json_schema import recipe_schema

SERVER = Path(sys.prefix) / "editors/node_modules/.bin/yaml-language-server"
pytestmark = pytest.mark.skipif(not SERVER.exists(), reason="yaml-language-server is not installed")
RECIPE = """\
# yaml-language-server: $schema=merge-cli.schema.json
merge_method: ties
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 1.0}
  - model: org/code
parameters:
  lambda: 0.3
  dens
"""
TYPO = "merge_method: soup\nmodels: [org/a, org/b]\ndtpye: bfloat16\n"


class Editor:
    """The half of the language server protocol that these tests need."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [str(SERVER), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
        )
        self._number = 0
        self._published: dict[str, list[dict[str, Any]]] = {}
        self.ask("initialize", processId=None, rootUri=folder.as_uri(), capabilities={})
        self._send({"method": "initialized", "params": {}})

    def open(self, path: Path, text: str) -> str:
        """Open a file and wait for what is underlined; its address."""
        path.write_text(text)
        document = {"uri": path.as_uri(), "languageId": "yaml", "version": 1, "text": text}
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        while path.as_uri() not in self._published:
            self._receive()
        return path.as_uri()

    def underlined(self, uri: str) -> list[str]:
        return [item["message"] for item in self._published[uri]]

    def completions(self, uri: str, line: int, character: int) -> set[str]:
        position = {"line": line, "character": character}
        found = self.ask("textDocument/completion", textDocument={"uri": uri}, position=position)
        items = found["items"] if isinstance(found, dict) else found
        return {item["label"] for item in items}

    def ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        number = self._number
        self._send({"id": number, "method": method, "params": params})
        while True:
            message = self._receive()
            if message.get("id") == number and "method" not in message:
                return message["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """The next message; what the server asks for is answered with nothing."""
        assert self._process.stdout is not None
        length = 0
        while line := self._process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        assert length, "the server has ended"
        message: dict[str, Any] = json.loads(self._process.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            params = message["params"]
            self._published[params["uri"]] = params["diagnostics"]
        elif "method" in message and "id" in message:
            empty = [None] * len(message.get("params", {}).get("items", []))
            self._send({"id": message["id"], "result": empty or None})
        return message


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Editor, Path]]:
    folder = tmp_path_factory.mktemp("editor")
    (folder / "merge-cli.schema.json").write_text(json.dumps(recipe_schema()))
    editor = Editor(folder)
    yield editor, folder
    editor.close()


def test_a_methods_parameters_are_completed(editor: tuple[Editor, Path]) -> None:
    server, folder = editor
    uri = server.open(folder / "recipe.yaml", RECIPE)
    offered = server.completions(uri, RECIPE.count("\n") - 1, len("  dens"))
    assert "density" in offered
    assert "t" not in offered  # slerp's


def test_a_typo_is_underlined(editor: tuple[Editor, Path]) -> None:
    server, folder = editor
    header = RECIPE.splitlines()[0]
    uri = server.open(folder / "typo.yaml", f"{header}\n{TYPO}")
    assert any("dtpye" in message for message in server.underlined(uri))
    fine = TYPO.replace("dtpye", "dtype")
    uri = server.open(folder / "fine.yaml", f"{header}\n{fine}")
    assert server.underlined(uri) == []
