"""A small Hugging Face Hub on 127.0.0.1, for tests: downloads here, uploads in `hub_uploads`.

    with HubServer(home=tmp_path / "hf") as hub:
        commit = hub.add("org/model", {"config.json": b"{}"}, branch="main", tag="v1")
        subprocess.run([...], env=hub.env())   # another process
        hub.requests                           # what was asked for, and how many bytes were sent

In the same process huggingface_hub has read its environment already, so take the fixture `hub`:
conftest.py names this module among the plugins.

As on the real Hub: metadata of a gated repository is public and its files are not; a file in LFS
(`.safetensors`, `.bin`) is answered with a redirect to another origin, where no token may go; a
repository that one may not see looks like one that does not exist. hf-xet is never offered and is
switched off by `env()` and by the fixture. Not here: datasets, downloads by
Xet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from tests.support.hub_uploads import LFS, Problem, Uploads

CHUNK = 64 * 1024


@dataclass
class Request:
    """One request as it was seen. `sent`, `received`: bytes of bodies; `cdn`: the second origin."""

    method: str
    path: str
    query: str
    range: str
    token: str
    cdn: bool
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `path`."""

    times: int
    path: str
    method: str
    status: int = 0
    code: str = ""
    cut_after: int = -1
    reset: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


class HubServer:
    """The server. It listens from construction to `stop()` or the end of the `with` block.

    Args:
        home: HF_HOME of the processes that use it.
        page_size: entries on one page of a tree listing.
    """

    token = "hf_accepted"  # sees everything, and writes under `writable`
    stranger = "hf_stranger"  # a valid account that may see neither private nor gated repositories

    def __init__(self, home: Path, page_size: int = 3) -> None:
        self.home = home
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.writable = {"me", "org"}  # the namespaces under which `token` may create
        self.objects: dict[str, bytes] = {}  # LFS files that have arrived, by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}  # and those that arrive part by part
        self.part_size = 3_000_000
        self.cas: Path | None = None  # a folder that stands for Xet's storage; None: no Xet
        self.messages: dict[str, str] = {}  # of commits that came by an upload
        self.stalled = ""  # requests whose path contains it are never answered
        self.pause = 0.0  # seconds before each chunk of a body
        self.ranges = True  # whether it knows of them
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        self._servers = [self._listen(cdn) for cdn in (False, True)]
        hub, cdn = (server.server_port for server in self._servers)
        # Another host, or huggingface_hub would follow its redirects as the Hub's own.
        self.url, self.cdn_url = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"

    def _listen(self, cdn: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "cdn": cdn})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away: refuse new connections and drop the ones that clients keep open."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # the client was quicker
                    connection.shutdown(socket.SHUT_RDWR)

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        branch: str = "main",
        tag: str | None = None,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """A new commit that holds exactly these files, as the head of `branch`; returns its id."""
        if isinstance(files, Path):
            paths = sorted(p for p in files.rglob("*") if p.is_file())
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in paths}
        repo = self.repos.setdefault(repo_id, Repo())
        repo.private, repo.gated = private, gated
        commit = hashlib.sha1(f"{repo_id} {branch} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        if tag:
            repo.tags[tag] = commit
        return commit

    def fail(
        self, status: int, times: int = 1, path: str = "", method: str = "", code: str = "",
        **headers: str,
    ) -> None:  # fmt: skip
        """Answer the next `times` matching requests with `status` (and an X-Error-Code)."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(times, path, method, status=status, code=code, headers=named))

    def cut(self, after: int, times: int = 1, path: str = "", reset: bool = False) -> None:
        """Close the connection `after` bytes of a body; `reset` makes it a TCP reset."""
        self.faults.append(Fault(times, path, "GET", cut_after=after, reset=reset))

    def heal(self) -> None:
        """Drop the faults that are left."""
        self.faults.clear()

    def sent(self, path: str = "") -> int:
        """Body bytes sent for requests whose path contains `path`."""
        return sum(r.sent for r in self.requests if path in r.path)

    def settings(self) -> dict[str, str]:
        """The environment variables that point huggingface_hub here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "*",
        }

    def env(self, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """This process's environment, pointed here, for a subprocess."""
        ours = {k: v for k, v in os.environ.items() if k not in _foreign()}
        extra = {"HF_TOKEN": token} if token else {}
        return ours | self.settings() | extra | ({"HF_HUB_OFFLINE": "1"} if offline else {})


def _foreign() -> list[str]:
    """Hub settings of the machine that runs the tests, which must not reach a test."""
    prefixes = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE")
    return [k for k in os.environ if k.startswith(prefixes)]


_KINDS = ("resolve", "revision", "tree", "refs", "xet-write-token")


class _Handler(Uploads, BaseHTTPRequestHandler):
    hub: HubServer
    cdn: bool
    protocol_version = "HTTP/1.1"  # keep-alive, as on the Hub

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        byte_range = self.headers.get("Range", "")
        body = self._body() if self.command in ("PUT", "POST") else b""
        self.seen = Request(self.command, url.path, url.query, byte_range, token, self.cdn)
        self.seen.received = len(body)
        with self.hub.lock:
            self.hub.requests.append(self.seen)
            self.fault = self._next_fault(url.path)
        try:
            if self.fault and self.fault.status:
                raise Problem(self.fault.status, self.fault.code, "injected fault")
            if self.command in ("PUT", "POST"):
                if not self.cdn:
                    self._check_token()
                if self.hub.stalled and self.hub.stalled in url.path:
                    time.sleep(600)  # a daemon thread
                self.upload([unquote(p) for p in url.path.strip("/").split("/")], body)
            elif self.cdn:
                self._content(self._blob(url.path.removeprefix("/cdn/")))
            else:
                self._check_token()
                self._route([unquote(p) for p in url.path.strip("/").split("/")], url.query)
        except Problem as problem:
            headers = {"X-Error-Code": problem.code} if problem.code else {}
            body = json.dumps({"error": problem.message}).encode()
            headers |= {"X-Error-Message": problem.message, "Content-Type": "application/json"}
            headers |= self.fault.headers if self.fault else {}
            self._reply(problem.status, body, headers)

    def _body(self) -> bytes:
        """What a client sends: with its length, or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _next_fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.path in path and fault.method in ("", self.command):
                # A cut is about a body: a redirect on the way to it does not count.
                if fault.cut_after >= 0 and not self.cdn and path.endswith(LFS):
                    continue
                fault.times -= 1
                return fault
        return None

    def _check_token(self) -> None:
        if self.seen.token not in ("", self.hub.token, self.hub.stranger):
            raise Problem(401, "", "Invalid credentials in Authorization header")

    def _route(self, parts: list[str], query: str) -> None:
        if parts == ["api", "agent-harnesses"]:  # asked by huggingface_hub itself, now and then
            return self._json({})
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        size = 2 if "/".join(parts[:2]) in self.hub.repos or len(parts) == 2 else 1
        if len(parts) > 2 and parts[1] not in _KINDS:
            size = 2
        repo_id, rest = "/".join(parts[:size]), parts[size:]
        repo = self._repo(repo_id)
        kind, rest = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        if api and kind == "xet-write-token" and self.hub.cas is not None:
            return self._json(self.xet_token())
        if api and kind == "revision":
            return self._info(repo_id, repo, self._commit(repo, rest[0]), query)
        if api and kind == "refs":
            return self._refs(repo)
        if api and kind == "tree":
            return self._tree(repo, self._commit(repo, rest[0]), "/".join(rest[1:]), query)
        if kind == "resolve" and len(rest) > 1:
            return self._resolve(repo, self._commit(repo, rest[0]), "/".join(rest[1:]))
        raise Problem(404, "", "Not Found")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.seen.token != self.hub.token):
            # Without a token the Hub does not even say whether the repository exists.
            status = 404 if self.seen.token else 401
            message = "Repository not found" if self.seen.token else "Invalid username or password."
            raise Problem(status, "RepoNotFound", message)
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        for names in (repo.branches, repo.tags):
            if revision in names:
                return names[revision]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [c for c in repo.commits if c.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _info(self, repo_id: str, repo: Repo, commit: str, query: str) -> None:
        asked = parse_qs(query)
        siblings = [{"rfilename": n, **_facts(n, b)} for n, b in repo.commits[commit].items()]
        if "blobs" not in asked:
            siblings = [{"rfilename": s["rfilename"]} for s in siblings]
        every = {"sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
        every |= {"gated": "manual" if repo.gated else False, "downloads": 0, "likes": 0}
        wanted = {k: v for k, v in every.items() if k in asked.get("expand", every)}
        self._json({"_id": "0", "id": repo_id, "modelId": repo_id, **wanted})

    def _refs(self, repo: Repo) -> None:
        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()
            ]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def _tree(self, repo: Repo, commit: str, folder: str, query: str) -> None:
        asked = parse_qs(query)
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, data in sorted(repo.commits[commit].items()):
            if not name.startswith(prefix):
                continue
            head, slash, _ = name.removeprefix(prefix).partition("/")
            if slash and asked.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                path = prefix + head
                entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            else:
                facts = _facts(name, data)
                entries[name] = {"type": "file", "path": name, "oid": facts.pop("blobId"), **facts}
        start = int(asked.get("cursor", ["0"])[0])
        page = list(entries.values())[start : start + self.hub.page_size]
        headers = {}
        if start + self.hub.page_size < len(entries):
            cursor = f"cursor={start + self.hub.page_size}"
            kept = "&".join(p for p in query.split("&") if p and not p.startswith("cursor="))
            url = f"{self.hub.url}{self.seen.path}?{kept}&{cursor}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._json(page, headers)

    def _resolve(self, repo: Repo, commit: str, name: str) -> None:
        if repo.gated and self.seen.token != self.hub.token:
            status = 403 if self.seen.token else 401
            raise Problem(status, "GatedRepo", "Access to this model is restricted.")
        data = repo.commits[commit].get(name)
        if data is None:
            raise Problem(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(LFS):
            return self._content(data, headers | {"ETag": f'"{_facts(name, data)["blobId"]}"'})
        digest = hashlib.sha256(data).hexdigest()
        # The blob's name is in the address so that faults and assertions can select by file.
        headers |= {"Location": f"{self.hub.cdn_url}/cdn/{digest}/{quote(name)}"}
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        self._reply(302, b"Found. Redirecting", headers)

    def _blob(self, address: str) -> bytes:
        digest, _, name = unquote(address).partition("/")
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                if name in files and hashlib.sha256(files[name]).hexdigest() == digest:
                    return files[name]
        raise Problem(404, "", "Not Found")

    def _content(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """The bytes, or the one range of them that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.seen.range)
        if not asked or not self.hub.ranges:
            return self._reply(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data) - 1) + 1, len(data))
        if start >= len(data):
            return self._reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._reply(206, data[start:stop], {**(headers or {}), **part})

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._reply(200, json.dumps(value).encode(), {**kind, **(headers or {})})

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.seen.status = status
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut_after if self.fault and status < 300 else -1
        body = body if cut < 0 else body[:cut]
        try:
            for start in range(0, len(body), CHUNK):
                # Counted before it is sent: the client may have it before this thread goes on.
                time.sleep(self.hub.pause)
                self.seen.sent += len(body[start : start + CHUNK])
                self.wfile.write(body[start : start + CHUNK])
        except OSError:  # the client had enough and hung up
            cut = 0
        if cut >= 0:
            if self.fault and self.fault.reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            self.close_connection = True


def _facts(name: str, data: bytes) -> dict[str, Any]:
    """Size and ids of a file as the Hub's listings give them."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if not name.endswith(LFS):
        return {"size": len(data), "blobId": blob}
    digest = hashlib.sha256(data).hexdigest()
    # Two spellings of one key: model info says sha256, a tree listing says oid.
    lfs = {"size": len(data), "sha256": digest, "oid": digest, "pointerSize": 134}
    return {"size": len(data), "blobId": blob, "lfs": lfs}


def point_here(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process's huggingface_hub, imported already or not, use this server."""
    for name in _foreign():
        monkeypatch.delenv(name)
    for name, value in hub.settings().items():
        monkeypatch.setenv(name, value)
    from huggingface_hub import constants, hf_api

    cache = str(hub.home / "hub")
    changed: dict[str, object] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(hub.home),
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "HF_TOKEN_PATH": str(hub.home / "token"),
        "HF_STORED_TOKENS_PATH": str(hub.home / "stored_tokens"),
        "HF_XET_CACHE": str(hub.home / "xet"),
        "AGENT_HARNESSES_PATH": str(hub.home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
    }
    for name, setting in changed.items():
        monkeypatch.setattr(constants, name, setting)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # the module-level functions share it


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that huggingface_hub uses in this process, with an empty cache and no token."""
    with HubServer(home=tmp_path / "hf-home") as server:
        point_here(server, monkeypatch)
        from huggingface_hub import close_session

        close_session()  # connections to the server of an earlier test
        yield server
        close_session()
