"""Uploads, against a small server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import merge_cli
from merge_cli.errors import CorruptFileError, HubError, SourceError, UsageError
from merge_cli.publishing.package import pack
from tests.support.command import failed
from tests.support.hub_server import HubServer
from tests.support.tiny import Family, llama_config, read_model, write_model

# huggingface_hub's own way of sending files, which its HTTP library would like to be another.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LARGE = 2_000_000  # elements: 4 MB in bfloat16


@pytest.fixture
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def merged(family: Family, tmp_path: Path) -> Path:
    return merge_cli.merge(family.recipe("ties"), tmp_path / "merged").path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A merge in three shards of 4 MB."""
    torch.manual_seed(0)
    tensors = {f"layer.{i}.weight": torch.randn(LARGE).bfloat16() for i in range(3)}
    write_model(tmp_path / "source", tensors, llama_config())
    recipe = tmp_path / "large.yaml"
    recipe.write_text("merge_method: soup\nmodels: [./source, ./source]\n")
    return merge_cli.merge(recipe, tmp_path / "large", shard_size=2 * LARGE).path


def remote(hub: HubServer, repo_id: str, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[repo_id]
    return repo.commits[repo.branches[branch]]


def uploads(hub: HubServer) -> list[str]:
    """The LFS contents that arrived, in order."""
    return [r.path for r in hub.requests if r.method == "PUT" and r.status == 200]


def cli(
    hub: HubServer, *arguments: object, token: str | None = ""
) -> subprocess.CompletedProcess[str]:
    token = hub.token if token == "" else token
    command = [sys.executable, "-m", "merge_cli", "push", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=hub.env(token=token), timeout=120
    )


def test_everything_arrives_in_one_commit(logged_in: HubServer, merged: Path) -> None:
    hub = logged_in
    pushed = merge_cli.push(merged, "org/ties")
    there = remote(hub, "org/ties")
    here = {p.name: p.read_bytes() for p in merged.iterdir()}
    assert there.keys() == here.keys() | {".gitattributes"}
    assert {n for n in here if here[n] != there[n]} == {"README.md"}  # names its repository
    assert b'model_id = "org/ties"' in there["README.md"]
    assert b'model_id = "merged"' in here["README.md"]
    assert hub.repos["org/ties"].private
    assert pushed.created
    assert pushed.changed
    assert pushed.commit == hub.repos["org/ties"].branches["main"]
    assert hub.messages == {pushed.commit: f"ties merge by merge-cli {version('merge-cli')}"}


def test_what_was_pushed_can_be_merged(logged_in: HubServer, merged: Path, tmp_path: Path) -> None:
    merge_cli.push(merged, "org/ties")
    recipe = tmp_path / "again.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [hf://org/ties]\n")
    again = merge_cli.merge(recipe, tmp_path / "again").path
    for name, tensor in read_model(merged).items():
        assert torch.equal(tensor, read_model(again)[name])


def test_again_there_is_nothing_to_do(logged_in: HubServer, merged: Path) -> None:
    first = merge_cli.push(merged, "org/ties")
    count = len(uploads(logged_in))
    second = merge_cli.push(merged, "org/ties")
    assert not second.changed
    assert second.commit == first.commit
    assert len(uploads(logged_in)) == count


def test_a_shard_in_parts(logged_in: HubServer, large: Path) -> None:
    """Files above the server's limit go part by part."""
    merge_cli.push(large, "org/large")
    there = remote(logged_in, "org/large")
    for path in large.glob("*.safetensors"):
        assert there[path.name] == path.read_bytes()
    assert sum(path.endswith("/2") for path in uploads(logged_in)) == 3


def test_an_upload_that_fails_sends_the_rest(logged_in: HubServer, large: Path) -> None:
    hub = logged_in
    shards = sorted(large.glob("*.safetensors"))
    second = _digest(shards[1])
    hub.fail(403, times=1, path=second)
    with pytest.raises(HubError, match="this token may not write there") as raised:
        merge_cli.push(large, "org/large")
    assert "model-00002-of-00003" in str(raised.value)
    assert list(remote(hub, "org/large")) == [".gitattributes"]  # nothing half
    first = [path for path in uploads(hub) if _digest(shards[0]) in path]
    merge_cli.push(large, "org/large")
    assert [path for path in uploads(hub) if _digest(shards[0]) in path] == first  # not again
    assert remote(hub, "org/large")[shards[1].name] == shards[1].read_bytes()


def test_killed_and_resumed(hub: HubServer, large: Path) -> None:
    shards = sorted(large.glob("*.safetensors"))
    hub.stalled = _digest(shards[2])
    command = [sys.executable, "-m", "merge_cli", "push", str(large), "org/large"]
    process = subprocess.Popen(
        command, env=hub.env(token=hub.token), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(hub.stalled in r.path for r in hub.requests):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.endswith("Interrupted.\n")
    assert len(hub.objects) == 2
    hub.stalled = ""
    before = len(uploads(hub))
    done = cli(hub, large, "org/large")
    assert done.returncode == 0, done.stderr
    assert {path.split("/")[2] for path in uploads(hub)[before:]} == {_digest(shards[2])}
    there = remote(hub, "org/large")
    assert all(there[path.name] == path.read_bytes() for path in shards)


def test_through_xet(hub: HubServer, large: Path, tmp_path: Path) -> None:
    """What the Hub uses today: hf_xet itself, with a folder for its storage."""
    pytest.importorskip("hf_xet")
    hub.cas = tmp_path / "cas"
    hub.cas.mkdir()
    command = [sys.executable, "-m", "merge_cli", "push", str(large), "org/large"]
    env = {k: v for k, v in hub.env(token=hub.token).items() if k != "HF_HUB_DISABLE_XET"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not uploads(hub)
    assert list(hub.cas.rglob("xorbs/*"))
    there = remote(hub, "org/large")
    for path in large.glob("*.safetensors"):  # the server keeps the name that the commit gave
        assert there[path.name] == _digest(path).encode()


def test_visibility_is_never_changed(logged_in: HubServer, merged: Path) -> None:
    logged_in.add("org/open", {"README.md": b""})
    with pytest.raises(UsageError, match="everybody can read it — org/open — Give --public"):
        merge_cli.push(merged, "org/open")
    assert list(remote(logged_in, "org/open")) == ["README.md"]
    merge_cli.push(merged, "org/open", public=True)
    assert not logged_in.repos["org/open"].private
    merge_cli.push(merged, "org/new", public=True)
    assert not logged_in.repos["org/new"].private
    merge_cli.push(merged, "org/closed")
    with pytest.raises(UsageError, match="exists and is private — org/closed — Leave out --public"):
        merge_cli.push(merged, "org/closed", public=True)


def test_another_model_is_replaced_only_if_asked(
    logged_in: HubServer, large: Path, merged: Path
) -> None:
    merge_cli.push(large, "org/m")
    with pytest.raises(UsageError, match="holds another model — org/m — --overwrite replaces"):
        merge_cli.push(merged, "org/m")
    pushed = merge_cli.push(merged, "org/m", overwrite=True)
    old = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(pushed.removed) == [*old, "model.safetensors.index.json"]
    weights = [n for n in remote(logged_in, "org/m") if n.endswith(".safetensors")]
    assert weights == ["model.safetensors"]


def test_branch_and_message(logged_in: HubServer, merged: Path) -> None:
    hub = logged_in
    pushed = merge_cli.push(merged, "org/m", branch="try/1", message="First try")
    assert list(remote(hub, "org/m")) == [".gitattributes"]
    assert "model.safetensors" in remote(hub, "org/m", "try/1")
    assert hub.messages[pushed.commit] == "First try"
    assert pushed.url.endswith("/org/m/tree/try/1")
    hub.repos["org/m"].tags["v1"] = pushed.commit
    with pytest.raises(UsageError, match="'v1' is a tag"):
        merge_cli.push(merged, "org/m", branch="v1")


def test_a_branch_that_moves(logged_in: HubServer, merged: Path) -> None:
    logged_in.fail(412, path="/commit/")
    with pytest.raises(HubError, match="the branch has moved during the upload"):
        merge_cli.push(merged, "org/m")


def test_no_token_no_right_no_connection(
    hub: HubServer, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="there is no token") as raised:
        merge_cli.push(merged, "org/m")
    assert "hf auth login" in raised.value.hint
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    with pytest.raises(HubError, match="this token may not write there") as raised:
        merge_cli.push(merged, "org/m")
    assert hub.stranger not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", "hf_geheimß")
    with pytest.raises(HubError, match="token is not valid") as raised:
        merge_cli.push(merged, "org/m")
    assert "geheim" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(HubError, match="You don't have the rights to create a model under"):
        merge_cli.push(merged, "else/m")
    hub.fail(500, times=99)
    with pytest.raises(HubError, match="status 500") as raised:
        merge_cli.push(merged, "org/m")
    hub.stop()
    with pytest.raises(HubError, match="cannot be reached") as raised:
        merge_cli.push(merged, "org/m")
    assert "the upload resumes" in raised.value.hint


def test_a_hub_in_trouble(
    logged_in: HubServer, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub has tried again and again by itself, here without the pauses."""
    second = _digest(sorted(large.glob("*.safetensors"))[1])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    logged_in.fail(503, times=99, path=second)
    with pytest.raises(HubError, match="status 503") as raised:
        merge_cli.push(large, "org/large")
    assert "the upload resumes" in raised.value.hint
    assert len(logged_in.objects) == 1
    logged_in.heal()
    assert merge_cli.push(large, "org/large").changed


def test_offline(hub: HubServer, merged: Path) -> None:
    command = [sys.executable, "-m", "merge_cli", "push", str(merged), "org/m"]
    env = hub.env(token=hub.token, offline=True)
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    failed(done, 3, "offline mode is on (HF_HUB_OFFLINE)")


def test_what_is_not_a_merge(hub: HubServer, family: Family, large: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        merge_cli.push(tmp_path / "none", "org/m")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(SourceError, match="not finished"):
        merge_cli.push(tmp_path / "half", "org/m")
    with pytest.raises(SourceError, match="is not a model that merge-cli has merged"):
        merge_cli.push(family.folder / "a", "org/m")
    for name, words in (("ties", "owner is missing"), ("a/b/c", "not a valid name on the Hub")):
        with pytest.raises(UsageError, match=words):
            merge_cli.push(large, name)
    card = (large / "README.md").read_text()
    (large / "README.md").write_text("# no metadata\n")
    with pytest.raises(CorruptFileError, match="begins with no metadata that"):
        merge_cli.push(large, "org/m")
    (large / "README.md").write_text(card)
    next(large.glob("*-00002-*")).unlink()
    with pytest.raises(CorruptFileError, match="1 of the files that the index names are missing"):
        merge_cli.push(large, "org/m")
    assert not hub.requests


def test_a_card_that_the_hub_refuses(logged_in: HubServer, merged: Path) -> None:
    card = (merged / "README.md").read_text()
    for wrong, words in (
        ("license: other\n", '"license_name" is required'),
        ("base_model_relation: cousin\n", "must be one of"),
        ("license: [unclosed\n", "no metadata that can be read"),
    ):
        (merged / "README.md").write_text(card.replace("---\n", f"---\n{wrong}", 1))
        with pytest.raises(CorruptFileError, match=words):
            merge_cli.push(merged, "org/m")
    assert "org/m" not in logged_in.repos


def test_hidden_files_stay_here(logged_in: HubServer, merged: Path) -> None:
    (merged / ".cache").mkdir()
    (merged / ".cache" / "secret").write_text("x")
    (merged / "plots").mkdir()
    (merged / "plots" / "a.txt").write_text("x")
    merge_cli.push(merged, "org/m")
    names = set(remote(logged_in, "org/m"))
    assert "plots/a.txt" in names
    assert not any("secret" in name for name in names)


def test_dry_run_asks_nothing(hub: HubServer, merged: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in merged.iterdir()}
    done = cli(hub, merged, "org/m", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert "would upload to org/m, private" in done.stdout
    assert "model.safetensors" in done.stdout
    assert 'model_id = "org/m"' in done.stdout
    assert "states no licence" in done.stderr
    assert "name local folders" in done.stderr
    assert not hub.requests
    assert {p: p.stat().st_mtime_ns for p in merged.iterdir()} == before
    done = cli(hub, merged, "org/m", "--dry-run", "--json", "--quiet", token=None)
    found = json.loads(done.stdout)
    assert found["files"].keys() == {p.name for p in merged.iterdir()}
    assert found["bytes"] == sum(found["files"].values())
    assert done.stderr == ""


def test_notes_name_what_others_cannot_reach(merged: Path) -> None:
    """Models of stages, and paths of an evaluation; no stage, which has no folder any more."""
    report = json.loads((merged / "merge_report.json").read_text())
    local = {"model": "../a", "revision": None}
    fetched = {"model": "org/x", "revision": "0" * 40}
    report["inputs"] = [{"model": "first", "revision": None}, fetched, local]
    report["stages"] = [{"name": "first", "inputs": [local, {"model": "../b", "revision": None}]}]
    (merged / "merge_report.json").write_text(json.dumps(report))
    models = [{"model": merged.name}, {"model": "/home/me/base"}]
    (merged / "merge_evaluation.json").write_text(json.dumps({"models": models, "unmet": []}))
    notes = pack(merged, "org/m").notes
    assert any("name local folders (../a, ../b)" in note for note in notes)
    assert any(
        "merge_evaluation.json names folders of this machine (/home/me/base)" in note
        for note in notes
    )


def test_command_line(hub: HubServer, merged: Path) -> None:
    failed(cli(hub, merged, "org/m", token=None), 3, "there is no token to upload with")
    done = cli(hub, merged, "org/m", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["commit"] == hub.repos["org/m"].branches["main"]
    assert found["private"]
    done = cli(hub, merged, "org/m")
    assert "nothing to do: all " in done.stdout
    assert done.returncode == 0
    hub.add("org/open", {"README.md": b""})
    failed(cli(hub, merged, "org/open"), 2, "everybody can read it")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
