"""Stores on 127.0.0.1, for tests: S3 as moto serves it over HTTP, and a web server with ranges."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

BUCKET = "models"
_CHUNK = 64 * 1024


class S3Server:
    """A bucket of an S3 server.

    Attributes:
        settings: the environment variables that point botocore there.
    """

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.settings = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "*",
        }
        import boto3

        self.client: Any = boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id="tests",
            aws_secret_access_key="tests", region_name="us-east-1",
        )  # fmt: skip
        self.client.create_bucket(Bucket=BUCKET)

    def add(self, folder: Path, prefix: str) -> str:
        """Upload a folder; returns its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def stop(self) -> None:
        self.client.close()
        self._server.stop()


@dataclass
class WebServer:
    """A web server for files in memory, which knows ranges and ETags.

    Attributes:
        files: path -> content.
        statuses: path -> what is answered instead of it.
        ranges: whether it knows ranges.
        etags: whether it says which version it has.
        cuts: path -> after how many bytes of a body the connection ends, for each of the next ones.
        requests: method, path, range and the bytes sent of each.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    cuts: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"web": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients leave
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, folder: Path, prefix: str) -> str:
        """Serve a folder as it is now; returns its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self.files[f"/{prefix}/{name}"] = path.read_bytes()
        return f"{self.url}/{prefix}"

    def sent(self, ending: str) -> int:
        """Bytes of bodies that were sent of files whose path ends so."""
        return sum(sent for _, path, _, sent in self.requests if path.endswith(ending))

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range", "")
        status = self.web.statuses.get(path, 200 if path in self.web.files else 404)
        if status != 200:
            self.web.requests.append((self.command, path, wanted, 0))
            return self._send(status, b"", {})
        content = self.web.files[path]
        headers = {"Accept-Ranges": "bytes"} if self.web.ranges else {}
        if self.web.etags:
            headers["ETag"] = f'"{hashlib.md5(content).hexdigest()}"'
        body, match = content, re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if match and self.web.ranges:
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            body, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
        cuts = self.web.cuts.get(path, []) if self.command == "GET" else []
        sent = min(len(body), cuts.pop(0)) if cuts and len(body) > cuts[0] else len(body)
        sent = 0 if self.command == "HEAD" else sent
        self.web.requests.append((self.command, path, wanted, sent))
        self._send(status, body, headers, sent)

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        count = len(body) if sent is None else sent
        for start in range(0, count, _CHUNK):
            self.wfile.write(body[start : min(start + _CHUNK, count)])
        if count < len(body):
            self.close_connection = True
            self.connection.shutdown(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return s3_server


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    server = WebServer()
    yield server
    server.stop()
