"""Models on the Hub, against a small server that speaks its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import merge_cli
from merge_cli.errors import CorruptFileError, HubError, ResourceError
from merge_cli.hub import download as hub_download
from merge_cli.hub import models as hub_module
from merge_cli.hub.models import fetch_files, is_cached, open_hub, read_header
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.hub_server import HubServer
from tests.support.tiny import Family, llama_config, llama_family, read_model, write_model

BIG = 2_000_000


def big_model(folder: Path) -> Path:
    """Two shards of 4 MB each, so that fetching a header and fetching a file differ."""
    tensors = {f"layer.{i}.weight": torch.full((BIG,), float(i)).bfloat16() for i in range(2)}
    model = write_model(folder, tensors, llama_config(), shards=2)
    (model / "tokenizer.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"never wanted" * 1000)
    (model / "flax_model.msgpack").write_bytes(b"never wanted" * 1000)
    return model


def test_plan_fetches_headers_and_merge_only_what_it_reads(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("org/big", big_model(tmp_path / "big"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: soup\nmodels: [org/big, org/big]\n")
    plan = merge_cli.plan(recipe)
    assert hub.sent(".safetensors") < 100_000 < plan.bytes_read
    result = merge_cli.merge(plan, tmp_path / "out")
    assert hub.sent("pytorch_model.bin") == hub.sent("flax_model") == 0
    assert read_model(result.path)["layer.1.weight"][7] == 1.0
    resolved = (result.path / "merge_recipe.yaml").read_text()
    assert f"org/big@{commit}" in resolved
    asked = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert asked
    assert all(f"/resolve/{commit}/" in path for path in asked)
    card = (result.path / "README.md").read_text()
    assert "base_model:\n- org/big\n" in card

    before = hub.sent(".safetensors")
    merge_cli.merge(result.path / "merge_recipe.yaml", tmp_path / "again")
    assert hub.sent(".safetensors") == before  # from the cache
    same = [(p / "model.safetensors").read_bytes() for p in (tmp_path / "out", tmp_path / "again")]
    assert same[0] == same[1]


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add("org/m", {"config.json": b'{"v": 1}'}, tag="v1")
    second = hub.add("org/m", {"config.json": b'{"v": 2}'})
    for revision, expected in [(None, second), ("main", second), ("v1", first), (first[:8], first)]:
        assert open_hub("org/m", revision).commit == expected
    with pytest.raises(HubError, match="has no revision 'v9'"):
        open_hub("org/m", "v9")
    (tmp_path / "r.yaml").write_text("merge_method: soup\nmodels: [org/m@v9, org/x]\n")
    with pytest.raises(merge_cli.MergeCliError, match="2 models cannot be opened"):
        merge_cli.plan(tmp_path / "r.yaml")


def test_hf_names_are_the_hubs_whatever_is_on_disk(
    hub: HubServer, family: Family, tmp_path: Path
) -> None:
    commit = hub.add("org/a", family.folder / "a", tag="v1")
    hub.add("org/a", family.folder / "c")  # main has gone on
    write_model(family.folder / "org" / "a", family.models[1], llama_config())
    recipe = family.write(
        "merge_method: soup\nbase_model: hf://org/a@v1\n"
        "models: [hf://org/a@v1, {model: {path: hf://org/a, revision: v1}}]\n"
    )
    plan = merge_cli.plan(recipe)
    assert [source.revision for source in plan.sources] == [commit] * len(plan.sources)
    result = merge_cli.merge(plan, tmp_path / "out")
    resolved = (result.path / "merge_recipe.yaml").read_text()
    assert resolved.count(f"hf://org/a@{commit}") >= 3
    hub.repos["org/a"].tags.clear()
    merge_cli.merge(result.path / "merge_recipe.yaml", tmp_path / "again")
    same = [(p / "model.safetensors").read_bytes() for p in (tmp_path / "out", tmp_path / "again")]
    assert same[0] == same[1]
    for wrong in ("hf://datasets/org/a", "hf://", "hf://a b"):
        with pytest.raises(HubError, match="Write hf://organisation/name"):
            open_source(ModelRef(wrong), tmp_path)


def test_one_commit_even_if_the_branch_moves(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/m", {"config.json": b"1", "tokenizer.json": b"1"})
    model = open_hub("org/m")
    hub.add("org/m", {"config.json": b"2", "tokenizer.json": b"2"})
    folder = fetch_files(model, ["config.json", "tokenizer.json"])
    assert (folder / "config.json").read_bytes() == b"1"
    assert (folder / "tokenizer.json").read_bytes() == b"1"


def test_missing_private_and_gated(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    for name in ("org/private", "org/missing"):
        with pytest.raises(HubError, match="or it is private") as raised:
            open_hub(name)
        assert "HF_TOKEN" in raised.value.hint
    with pytest.raises(HubError, match="access must be requested") as raised:
        fetch_files(open_hub("org/gated"), ["config.json"])
    assert "org/gated" in raised.value.hint
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert open_hub("org/private").files == {"config.json": 2}
    fetch_files(open_hub("org/gated"), ["config.json"])


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add("org/m", big_model(tmp_path / "big"), private=True)
    model = open_hub("org/m")
    read_header(model, "model-00001-of-00002.safetensors")
    assert {r.token for r in hub.requests if not r.cdn} == {hub.token}
    assert {r.token for r in hub.requests if r.cdn} == {""}
    hub.fail(500, times=99)
    with pytest.raises(HubError, match="status 500") as raised:
        open_hub("org/m")
    assert hub.token not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", "hf_geheimß")
    with pytest.raises(HubError, match="token is not valid") as raised:
        open_hub("org/m")
    assert "geheim" not in str(raised.value)


def test_names_that_the_hub_cannot_have(tmp_path: Path) -> None:
    for name in ("./x", "/nowhere/x", "a/b/c", "../up"):
        with pytest.raises(merge_cli.MergeCliError, match="no such folder"):
            open_source(ModelRef(name), tmp_path)


def test_header_larger_than_the_first_request(hub: HubServer, tmp_path: Path) -> None:
    tensors = {f"a.rather.long.name.of.a.tensor.{i}": torch.zeros(1) for i in range(3000)}
    hub.add("org/m", write_model(tmp_path / "m", tensors))
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    header = read_header(open_hub("org/m"), "model.safetensors")
    assert len(header) > 100_000
    assert raw.startswith(header)
    assert len(raw) - len(header) == 3000 * 4


def test_offline_uses_the_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    family = llama_family(tmp_path)
    commit = hub.add("org/a", family.folder / "a")
    recipe = family.write("merge_method: passthrough\nmodels: [org/a]\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the cache"):
        merge_cli.plan(recipe)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model = open_hub("org/a")
    fetch_files(model, list(model.files))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    assert open_hub("org/a", commit).note == "offline: from the cache"
    merge_cli.merge(recipe, tmp_path / "out")
    assert len(hub.requests) == count


def test_unreachable_hub_falls_back_to_the_cache(hub: HubServer, tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    hub.add("org/a", family.folder / "a")
    model = open_hub("org/a")
    fetch_files(model, list(model.files))
    hub.stop()
    assert "cannot be reached" in open_hub("org/a").note
    with pytest.raises(HubError, match="cannot be reached"):
        open_hub("org/other")


def test_interrupted_download_continues(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "_NETWORK_BLOCK", 100_000)
    hub.add("org/m", big_model(tmp_path / "big"))
    model = open_hub("org/m")
    name = "model-00001-of-00002.safetensors"
    hub.cut(after=200_000, path=name, times=2)
    path = fetch_files(model, [name]) / name
    assert path.read_bytes() == (tmp_path / "big" / name).read_bytes()
    ranges = [r.range for r in hub.requests if r.cdn and r.range]
    assert any(not r.startswith("bytes=0-") for r in ranges)


def test_a_connection_that_is_reset(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/m", big_model(tmp_path / "big"))
    model = open_hub("org/m")
    name = "model-00001-of-00002.safetensors"
    hub.cut(after=1_000_000, path=name, times=2, reset=True)
    counts: list[int] = []
    path = fetch_files(model, [name], counts.append) / name
    assert path.read_bytes() == (tmp_path / "big" / name).read_bytes()
    assert sum(counts) == model.files[name]
    hub.cut(after=0, path="model-00002", times=99, reset=True)
    with pytest.raises(HubError, match="The download resumes"):
        fetch_files(model, ["model-00002-of-00002.safetensors"])


NAME = "model-00001-of-00002.safetensors"


def blobs(hub: HubServer) -> Path:
    return hub.home / "hub" / "models--org--m" / "blobs"


def stopped(hub: HubServer, tmp_path: Path) -> tuple[hub_module.HubModel, int, bytes]:
    """A repository of which a part of a file has arrived: the model, how much, and the file."""
    hub.add("org/m", big_model(tmp_path / "big"))
    model = open_hub("org/m")
    hub.cut(after=1_000_000, path=NAME, times=1)
    hub.cut(after=0, path=NAME, times=99)
    with pytest.raises(HubError):
        fetch_files(model, [NAME])
    hub.heal()
    hub.requests.clear()
    [partial] = blobs(hub).glob("*.incomplete")
    return model, partial.stat().st_size, (tmp_path / "big" / NAME).read_bytes()


def test_the_next_command_continues_inside_the_file(hub: HubServer, tmp_path: Path) -> None:
    model, here, whole = stopped(hub, tmp_path)
    assert 0 < here < len(whole)
    counts: list[int] = []
    assert (fetch_files(model, [NAME], counts.append) / NAME).read_bytes() == whole
    assert hub.sent(NAME) < len(whole) - here + 1000  # and the answer of the redirect
    assert sum(counts) == len(whole)
    assert not list(blobs(hub).glob("*.incomplete"))
    # As huggingface_hub lays it out, which then has nothing to do.
    from huggingface_hub import hf_hub_download

    count = len(hub.requests)
    found = hf_hub_download("org/m", NAME, revision=model.commit)
    assert Path(found).read_bytes() == whole
    assert Path(found).is_symlink()
    assert len(hub.requests) == count


def test_a_server_without_ranges(hub: HubServer, tmp_path: Path) -> None:
    model, _, whole = stopped(hub, tmp_path)
    hub.ranges = False
    counts: list[int] = []
    assert (fetch_files(model, [NAME], counts.append) / NAME).read_bytes() == whole
    assert sum(counts) == len(whole)


@pytest.mark.parametrize("damage", ["other bytes", "too long", "exactly as long"])
def test_what_has_arrived_is_not_believed(hub: HubServer, tmp_path: Path, damage: str) -> None:
    """A crash of the machine leaves zeros; another program may have written to the same file."""
    model, here, whole = stopped(hub, tmp_path)
    [partial] = blobs(hub).glob("*.incomplete")
    size = {"other bytes": here, "too long": len(whole) + 9, "exactly as long": len(whole)}[damage]
    partial.write_bytes(bytes(size))
    counts: list[int] = []
    assert (fetch_files(model, [NAME], counts.append) / NAME).read_bytes() == whole
    assert sum(counts) == len(whole)


def test_orphans_are_removed(hub: HubServer, tmp_path: Path) -> None:
    model, _, _ = stopped(hub, tmp_path)
    old, young = (blobs(hub) / f"{letter * 64}.0123abcd.incomplete" for letter in "ab")
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    fetch_files(model, [NAME])
    assert not old.exists()
    assert young.exists()  # somebody may be at it


def test_a_file_system_without_links(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/m", {"sub/config.json": b"{}"})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = fetch_files(open_hub("org/m"), ["sub/config.json"])
    assert (folder / "sub" / "config.json").read_bytes() == b"{}"


def test_a_full_disk(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/m", {"config.json": b"{}"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="the disk of the Hub's cache is full"):
        fetch_files(open_hub("org/m"), ["config.json"])


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every pause, without the pauses."""
    found: list[float] = []
    monkeypatch.setattr(hub_module, "_sleep", found.append)
    return found


def test_a_busy_hub_leaves_the_cache(hub: HubServer, tmp_path: Path, slept: list[float]) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    fetch_files(open_hub("org/m"), ["config.json"])
    hub.fail(429, times=99, Retry_After="5")
    assert open_hub("org/m").note == "the Hub answered with status 429: from the cache"
    assert slept == []


def test_a_busy_hub_is_asked_again_when_it_says(
    hub: HubServer, tmp_path: Path, slept: list[float]
) -> None:
    hub.add("org/m", big_model(tmp_path / "big"))
    hub.fail(429, Retry_After="7")
    model = open_hub("org/m")
    hub.fail(429, path="/resolve/", Retry_After="8")
    assert read_header(model, NAME)
    hub.fail(503, path="/resolve/", Retry_After="9")
    hub.fail(429, path="/cdn/", Retry_After="10")
    fetch_files(model, [NAME])
    assert slept == [7.0, 8.0, 9.0, 10.0]


def test_a_hub_that_wants_too_much_patience(hub: HubServer, slept: list[float]) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    model = open_hub("org/m")
    for name in ("/api/", "/resolve/"):
        hub.fail(429, times=99, path=name, Retry_After="3600")
    with pytest.raises(HubError, match="in 3600 seconds"):
        open_hub("org/m")
    with pytest.raises(HubError, match=r"too many requests .*hf auth login"):
        fetch_files(model, ["config.json"])
    assert slept == []


def test_the_offline_hint_names_the_revision(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as raised:
        open_hub("org/m", "v1.2")
    assert "hf download org/m --revision v1.2." in raised.value.hint
    with pytest.raises(HubError) as raised:
        open_hub("org/m")
    assert "hf download org/m." in raised.value.hint


def test_a_hub_in_trouble_leaves_the_cache(hub: HubServer, tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    hub.add("org/a", family.folder / "a")
    model = open_hub("org/a")
    fetch_files(model, list(model.files))
    hub.fail(503, times=99)
    assert "from the cache" in open_hub("org/a").note


def test_an_empty_shard(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/m", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(CorruptFileError, match="0 bytes long"):
        open_source(ModelRef("org/m"), tmp_path)


def test_progress_counts_every_byte(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/m", big_model(tmp_path / "big"))
    model = open_hub("org/m")
    names = [name for name in model.files if name.endswith(".safetensors")]
    for _ in range(2):  # the second time from the cache
        counts: list[int] = []
        fetch_files(model, names, counts.append)
        assert sum(counts) == sum(model.files[name] for name in names)
    assert all(is_cached(model, name) for name in names)


def test_command_line(hub: HubServer, family: Family, tmp_path: Path) -> None:
    hub.add("org/a", family.folder / "a")
    family.write("merge_method: soup\nmodels: [org/a@main, b, org/none]\n")
    command = [sys.executable, "-m", "merge_cli", "run", str(family.folder / "recipe.yaml"), "out"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=hub.env(), cwd=tmp_path, timeout=120
    )
    assert done.returncode == 3
    assert "org/none" in done.stderr
    family.write("merge_method: soup\nmodels: [org/a@main, b]\n")
    done = subprocess.run(
        command, capture_output=True, text=True, env=hub.env(), cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    inputs = json.loads((tmp_path / "out" / "merge_report.json").read_text())["inputs"]
    assert inputs[0]["revision"] == hub.repos["org/a"].branches["main"]


def test_a_header_is_asked_for_again(hub: HubServer, tmp_path: Path, slept: list[float]) -> None:
    """The Hub's storage answers 502 and 503 now and then, and does not say when to come back."""
    hub.add("org/m", big_model(tmp_path / "big"))
    model = open_hub("org/m")
    hub.fail(503, path="/cdn/")
    hub.fail(502, path="/resolve/")
    assert read_header(model, NAME)
    assert slept == [0.5, 1.0]
    hub.fail(503, times=99, path="/cdn/")
    with pytest.raises(HubError, match="status 503"):
        read_header(model, NAME)


@pytest.mark.parametrize("links", [True, False])
def test_a_cached_file_that_is_too_short_is_fetched_again(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    hub.add("org/m", big_model(tmp_path / "big"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    model = open_hub("org/m")
    file = fetch_files(model, [NAME]) / NAME
    whole = file.read_bytes()
    os.truncate(file, 1000)
    assert not is_cached(model, NAME)
    assert read_header(model, NAME) == whole[: len(read_header(model, NAME))]
    fetch_files(model, [NAME])
    assert file.read_bytes() == whole
