"""Pushing to a store: what is there is not sent again, and config.json comes last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import merge_cli
from merge_cli.errors import RemoteError, SourceError, UsageError
from merge_cli.options import MergeOptions, Progress
from merge_cli.publishing import store
from merge_cli.publishing.store import upload
from tests.support.command import cli, failed
from tests.support.stores import BUCKET, S3Server
from tests.support.tiny import Family

OPTIONS = MergeOptions(device="cpu", threads=1)


@pytest.fixture
def out(family: Family, tmp_path: Path) -> Path:
    recipe = family.recipe("soup", base=False)
    return merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS, shard_size=20_000).path


def keys(s3: S3Server, prefix: str) -> list[str]:
    """In the order in which they were written."""
    listed = s3.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    ordered = sorted(listed, key=lambda item: item["LastModified"])
    return [item["Key"].removeprefix(f"{prefix}/") for item in ordered]


def content(s3: S3Server, key: str) -> bytes:
    body: bytes = s3.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return body


def test_a_model_is_uploaded_and_read_again(
    out: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    address = f"s3://{BUCKET}/pushed"
    dry = cli("push", out, address, "--dry-run", "--json")
    assert json.loads(dry.stdout)["address"] == address
    assert keys(s3, "pushed") == []
    seen: list[Progress] = []
    done = merge_cli.push(out, address, on_progress=seen.append)
    names = {path.name for path in out.iterdir()}
    assert done.files.keys() == set(keys(s3, "pushed")) == names
    assert done.changed
    assert seen[-1].note == "config.json"
    assert seen[-1].done == seen[-1].total
    assert all(content(s3, f"pushed/{name}") == (out / name).read_bytes() for name in names)
    again = cli("push", out, address)
    assert "nothing to do" in again.stdout, again.stderr
    recipe = {"merge_method": "passthrough", "models": [{"model": address}]}
    copied = merge_cli.merge(recipe, tmp_path / "copy", options=OPTIONS, shard_size=20_000).path
    for path in out.glob("*.safetensors"):
        assert (copied / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("way", ["its name", "a link", "linked files"])
def test_a_folder_is_not_uploaded_to_itself(out: Path, tmp_path: Path, way: str) -> None:
    target = out if way == "its name" else tmp_path / "other"
    if way == "a link":
        target.symlink_to(out)
    elif way == "linked files":
        target.mkdir()
        (target / "config.json").hardlink_to(out / "config.json")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match="is the folder that is uploaded"):
        upload(out, f"file://{target}", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_upload_resumes(
    out: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"s3://{BUCKET}/interrupted"
    shards = sorted(path.name for path in out.glob("*.safetensors"))

    def stop(progress: Progress) -> None:
        if progress.note == shards[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload(out, address, on_progress=stop)
    there = keys(s3, "interrupted")
    assert "config.json" not in there
    assert set(shards[:2]) <= set(there)
    done = upload(out, address)
    assert not set(done.sent) & set(there)
    assert set(keys(s3, "interrupted")) == set(done.files)


def test_large_files_in_parts_are_known_again(
    out: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 * 2**20  # S3's least
    monkeypatch.setattr(store, "_PART", part)
    (out / "large.json").write_bytes(bytes(2 * part + 1))
    (out / "even.json").write_bytes(bytes(2 * part))
    address = f"s3://{BUCKET}/large"
    upload(out, address)
    head = s3.client.head_object(Bucket=BUCKET, Key="large/large.json")
    assert head["ETag"].strip('"').endswith("-3")
    assert upload(out, address).sent == ()


def test_another_model_is_replaced_on_request_alone(
    out: Path, family: Family, tmp_path: Path, s3: S3Server
) -> None:
    other = merge_cli.merge(
        family.recipe("ties"), tmp_path / "other", options=OPTIONS
    ).path  # one file
    address = f"s3://{BUCKET}/replaced"
    upload(out, address)
    with pytest.raises(UsageError, match="holds another model"):
        upload(other, address)
    done = upload(other, address, overwrite=True)
    assert set(done.removed) >= {path.name for path in out.glob("model-*.safetensors")}
    names = {path.name for path in other.iterdir()}
    assert names <= set(keys(s3, "replaced"))
    assert not [name for name in keys(s3, "replaced") if name.startswith("model-")]


def test_what_is_refused(
    out: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"s3://{BUCKET}/refused"
    failed(cli("push", out, address, "--public"), 2, "--public is for the Hub")
    failed(cli("push", out, "https://example.com/m"), 2, "takes no uploads")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="not a model that merge-cli has merged"):
        upload(tmp_path / "empty", address)
    with pytest.raises(RemoteError, match=r"\(404\)"):
        upload(out, "s3://no-such-bucket/m")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match="no credentials"):
        upload(out, address)


def test_a_folder(out: Path, tmp_path: Path) -> None:
    done = upload(out, f"file://{tmp_path}/store")
    assert set(done.sent) == {path.name for path in (tmp_path / "store").iterdir()}
