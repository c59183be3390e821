"""The part of the Hub's protocol that uploads use; `hub_server` has the rest.

    POST /api/repos/create                        a repository, private or public
    POST /api/models/ID/branch/NAME               a branch
    POST /api/validate-yaml                       whether a card's metadata can be read
    POST /api/models/ID/preupload/REV             for each file: plain git, or LFS
    POST /ID.git/info/lfs/objects/batch           which LFS files are still wanted, and where
    PUT  (second origin) /upload/SHA256/NAME...   the bytes: whole, or part by part
    POST /api/complete/SHA256                     the parts of one file are all there
    GET  /api/models/ID/xet-write-token/REV       instead of the last three, where there is Xet
    POST /api/models/ID/commit/REV                files, LFS pointers, deletions: one commit

As on the real Hub: bytes in LFS are kept whether or not a commit follows, are known by their
SHA-256, and are checked against it; a commit names them; a stale parent is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import yaml

LFS = (".safetensors", ".bin")


class Problem(Exception):
    """An answer that is a refusal."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class Uploads:
    """What a handler does with POST and PUT. `hub`, `seen`, `_json`, ... are the handler's."""

    hub: Any
    seen: Any
    command: str
    _repo: Callable[..., Any]
    _json: Callable[..., None]
    _reply: Callable[..., None]
    _commit: Callable[..., str]

    def upload(self, parts: list[str], body: bytes) -> None:
        """Answer a request that changes something; `parts` is the path, unquoted."""
        if self.command == "PUT":
            return self._put(parts, body)
        sent = json.loads(body) if body and parts[-2:-1] != ["commit"] else {}
        if parts == ["api", "validate-yaml"]:
            return self._validate(sent)
        if parts[:2] == ["api", "complete"]:
            return self._complete(parts[2], sent)
        if self.seen.token != self.hub.token:
            status = 403 if self.seen.token else 401
            raise Problem(status, "", "You don't have the rights to do this")
        if parts == ["api", "repos", "create"]:
            return self._create(sent)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(sent)
        repo_id, kind, name = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        repo = self._repo(repo_id)
        if kind == "branch":
            if name in repo.branches:
                raise Problem(409, "", f"Reference already exists: {name}")
            repo.branches[name] = repo.branches["main"]
            return self._json({})
        if kind == "preupload":
            return self._preupload(repo, name, sent)
        if kind == "commit":
            return self._commit_files(repo_id, repo, name, body)
        raise Problem(404, "", "Not Found")

    def _create(self, sent: dict[str, Any]) -> None:
        repo_id = f"{sent.get('organization') or 'me'}/{sent['name']}"
        if sent.get("organization") not in self.hub.writable:
            raise Problem(403, "", f"You don't have the rights to create a model under {repo_id}")
        if repo_id in self.hub.repos:
            raise Problem(409, "", "You already created this model repo")
        private = sent.get("visibility") == "private" or bool(sent.get("private"))
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.url}/{repo_id}"})

    def _validate(self, sent: dict[str, Any]) -> None:
        """The rules of the Hub that a card of ours could break."""
        _, front, _ = sent["content"].split("---\n", 2)
        data = yaml.safe_load(front)
        errors = [
            f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag")
            if key in data and not isinstance(data[key], str)
        ]  # fmt: skip
        errors += [
            f'"{key}" must be an array of strings'
            for key in ("tags", "language", "datasets", "base_model")
            if key in data and not all(isinstance(word, str) for word in _listed(data[key]))
        ]
        if data.get("base_model_relation", "merge") not in _RELATIONS:
            errors.append('"base_model_relation" must be one of ' + ", ".join(_RELATIONS))
        if data.get("license") == "other" and "license_name" not in data:
            errors.append('"license_name" is required when "license" is "other"')
        found = {"errors": [{"message": e} for e in errors], "warnings": []}
        self._reply(
            400 if errors else 200, json.dumps(found).encode(), {"Content-Type": "application/json"}
        )

    def _preupload(self, repo: Any, revision: str, sent: dict[str, Any]) -> None:
        there = repo.commits[self._commit(repo, revision)]

        def answer(file: dict[str, Any]) -> dict[str, Any]:
            name = file["path"]
            mode = "lfs" if name.endswith(LFS) else "regular"
            known = {"oid": oid(name, there[name])} if name in there else {}
            return {"path": name, "uploadMode": mode, "shouldIgnore": False, **known}

        self._json({"files": [answer(file) for file in sent["files"]]})

    def _batch(self, sent: dict[str, Any]) -> None:
        def answer(wanted: dict[str, Any]) -> dict[str, Any]:
            digest, size = wanted["oid"], wanted["size"]
            if digest in self.hub.objects:
                return {"oid": digest, "size": size}
            chunk = self.hub.part_size
            if size <= chunk:
                upload = {"href": f"{self.hub.cdn_url}/upload/{digest}"}
                return {"oid": digest, "size": size, "actions": {"upload": upload}}
            count = -(-size // chunk)
            address = f"{self.hub.cdn_url}/upload/{digest}"
            header = {str(i): f"{address}/{i}" for i in range(1, count + 1)}
            parts = {"href": f"{self.hub.url}/api/complete/{digest}",
                      "header": {"chunk_size": str(chunk), **header}}  # fmt: skip
            return {"oid": digest, "size": size, "actions": {"upload": parts}}

        self._json({"objects": [answer(wanted) for wanted in sent["objects"]]})

    def xet_token(self) -> dict[str, Any]:
        """Where Xet's storage is; hf_xet takes a folder for one."""
        return {"casUrl": f"local://{self.hub.cas}", "accessToken": "xet", "exp": 2**32}

    def _put(self, parts: list[str], body: bytes) -> None:
        digest, part = parts[1], parts[2] if len(parts) > 2 else ""
        if part:
            self.hub.parts.setdefault(digest, {})[int(part)] = body
        else:
            self._keep(digest, body)
        self._reply(200, b"", {"ETag": f'"{part}"'})

    def _complete(self, digest: str, sent: dict[str, Any]) -> None:
        there = self.hub.parts.pop(digest)
        numbers = [part["partNumber"] for part in sent["parts"]]
        if numbers != sorted(there):
            raise Problem(400, "", "some parts are missing")
        self._keep(digest, b"".join(there[number] for number in numbers))
        self._json({})

    def _keep(self, digest: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            raise Problem(400, "", "the content is not what its name says")
        self.hub.objects[digest] = body

    def _commit_files(self, repo_id: str, repo: Any, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        head = repo.branches[branch]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise Problem(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if self.hub.cas is not None:  # Xet's storage has the bytes
                    self.hub.objects.setdefault(value["oid"], value["oid"].encode())
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Problem(400, "", f"unknown: {line['key']}")
        commit = self.hub.add(repo_id, files, branch=branch, private=repo.private)
        self.hub.messages[commit] = header["summary"]
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})


def oid(name: str, data: bytes) -> str:
    """What git knows a file by: its blob, or in LFS its SHA-256."""
    if name.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_RELATIONS = ("adapter", "merge", "quantized", "finetune", "training_checkpoint")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
