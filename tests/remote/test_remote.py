"""Models at addresses: S3 over HTTP, a web server, files; plans, downloads, errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import MergeCliError, RemoteError, ResourceError, SourceError
from merge_cli.options import MergeOptions
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.remote import listing, models
from merge_cli.remote.models import RemoteModel, open_remote
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source, fetch_weights
from tests.support.command import cli, failed
from tests.support.stores import BUCKET, S3Server, WebServer
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)
NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "_sleep", lambda seconds: None)
    return tmp_path / "cache"


def weights(seed: int) -> dict[str, torch.Tensor]:
    made = llama_tensors(torch.Generator().manual_seed(seed), layers=2)
    return {name: value.bfloat16() for name, value in made.items()}


def model(folder: Path, seed: int, shards: int = 1) -> Path:
    write_model(folder, weights(seed), llama_config(layers=2), shards)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def opened(address: str) -> Source:
    return open_source(ModelRef(address), Path.cwd())


def soup(out: Path, *addresses: str) -> Path:
    recipe = {"merge_method": "soup", "models": [{"model": address} for address in addresses]}
    return merge_cli.merge(recipe, out, options=OPTIONS).path


def same_bytes(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.glob("*.safetensors"))
    assert names == sorted(path.name for path in right.glob("*.safetensors"))
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_a_merge_of_s3_and_a_web_server(tmp_path: Path, s3: S3Server, web: WebServer) -> None:
    one, two = model(tmp_path / "one", 1, shards=2), model(tmp_path / "two", 2, shards=3)
    first, second = s3.add(one, "merge/one"), web.add(two, "two")
    expected = soup(tmp_path / "expected", str(one), str(two))
    recipe = tmp_path / "soup.yaml"
    recipe.write_text(f"merge_method: soup\nmodels: [{{model: '{first}'}}, {{model: '{second}'}}]")
    planned = cli("plan", recipe, "--json")
    assert planned.returncode == 0, planned.stderr
    sizes = [path.stat().st_size for path in one.glob("*.safetensors")]
    downloads = json.loads(planned.stdout)["downloads"]
    assert downloads[first] == {"files": 2, "bytes": sum(sizes)}
    assert downloads[second]["files"] == 3
    assert f"downloads 2 files of {first}" in cli("plan", recipe).stdout.replace("\n", " ")
    shards = [name for name in web.files if name.endswith(".safetensors")]
    for shard in shards:  # nothing but headers was read
        assert "HEAD" in {method for method, path, *_ in web.requests if path == shard}
        assert all(r.startswith("bytes=0-") for m, p, r, _ in web.requests if p == shard and r)
    blobs = list((tmp_path / "cache").rglob("*.safetensors"))
    assert not blobs
    done = cli("run", recipe, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert same_bytes(tmp_path / "out", expected)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    before = len(web.requests)
    again = soup(tmp_path / "again", first, second)  # from the cache
    assert same_bytes(again, expected)
    assert not any(r for _, p, r, _ in web.requests[before:] if p.endswith(".safetensors"))


def test_file_and_memory(tmp_path: Path) -> None:
    import fsspec

    folder = model(tmp_path / "m", 3)
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/m/{path.name}", path.read_bytes())
    for address in (f"file://{folder}", "memory://m"):
        source = opened(address)
        fetch_weights(source, source.header_bytes)
        assert load_file(source.root / NAME).keys() == weights(3).keys()


def test_single_files(tmp_path: Path, s3: S3Server, web: WebServer) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    save_file(weights(1), folder / "a.safetensors")
    torch.save({"state_dict": weights(2)}, folder / "b.ckpt")
    left, right = s3.add(folder, "single"), web.add(folder, "single")
    out = soup(tmp_path / "out", f"{left}/a.safetensors", f"{right}/b.ckpt")
    expected = soup(tmp_path / "expected", str(folder / "a.safetensors"), str(folder / "b.ckpt"))
    assert same_bytes(out, expected)
    assert (out / "a.safetensors").is_file()
    assert not (out / "config.json").exists()
    with_config = model(tmp_path / "m", 4)
    address = web.add(with_config, "m")
    assert opened(f"{address}/{NAME}").config == opened(address).config


def test_an_interrupted_download_resumes(tmp_path: Path, web: WebServer) -> None:
    folder = tmp_path / "m"
    content = model(folder, 1) / NAME
    save_file({"w": torch.randn(400_000)}, content)
    size = content.stat().st_size
    address = web.add(folder, "m")
    remote = open_remote(address)
    web.cuts[f"/m/{NAME}"] = [10**9, 10**9, 5000, 5000]
    counts: list[int] = []

    def stop(count: int) -> None:
        counts.append(count)
        if sum(counts) > size // 3:
            raise KeyboardInterrupt

    models._BLOCK, block = size // 4, models._BLOCK
    try:
        with pytest.raises(KeyboardInterrupt):
            remote.fetch([NAME], stop)
        kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.incomplete")]
        assert kept == [size // 4 * 2]
        counts.clear()
        sent = web.sent(NAME)
        path = remote.fetch([NAME], counts.append) / NAME  # two connections break on the way
    finally:
        models._BLOCK = block
    assert path.read_bytes() == content.read_bytes()
    assert sum(counts) == size
    assert web.sent(NAME) - sent <= size // 2 + 2 * 5000 + 10
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes(tmp_path: Path, web: WebServer, etags: bool) -> None:
    folder = model(tmp_path / "m", 1)
    address = web.add(folder, "m")
    web.etags = etags
    if not etags:
        with pytest.raises(RemoteError, match="which version"):
            opened(address)
        return
    remote = open_remote(address)
    save_file(weights(2), folder / NAME)
    web.files[f"/m/{NAME}"] = (folder / NAME).read_bytes()
    with pytest.raises(RemoteError, match="has changed since the plan"):
        remote.fetch([NAME])
    again = open_remote(address)
    assert again.commit != remote.commit
    assert (again.fetch([NAME]) / NAME).read_bytes() == (folder / NAME).read_bytes()


def test_a_file_that_changes_on_the_way(tmp_path: Path, s3: S3Server) -> None:
    folder = model(tmp_path / "m", 1)
    remote = open_remote(s3.add(folder, "changing"))
    other = model(tmp_path / "other", 2)

    def exchange(count: int) -> None:
        if not count:
            return
        s3.client.put_object(
            Bucket=BUCKET, Key=f"changing/{NAME}", Body=(other / NAME).read_bytes()
        )

    with pytest.raises(RemoteError, match="has changed since the plan"):
        remote.fetch([NAME], exchange)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_an_adapter_at_an_address(tmp_path: Path, web: WebServer) -> None:
    model(tmp_path / "base", 1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    target = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    factors = {f"base_model.model.{target}.lora_A.weight": a,
               f"base_model.model.{target}.lora_B.weight": b}  # fmt: skip
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    reference = f"{tmp_path / 'base'}+{web.add(adapter, 'adapter')}"
    assert parse_reference(reference, tmp_path).lora == f"{web.url}/adapter"
    out = soup(tmp_path / "out", reference)
    stored = weights(1)[f"{target}.weight"]
    expected = (stored.float() + b @ a).bfloat16()
    assert torch.allclose(read_model(out)[f"{target}.weight"], expected, atol=0, rtol=2**-7)


def message_of(address: str) -> str:
    with pytest.raises(MergeCliError) as caught:
        opened(address)
    assert isinstance(caught.value, SourceError | ResourceError)
    return str(caught.value)


def test_errors_are_named(
    tmp_path: Path, s3: S3Server, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = web.add(model(tmp_path / "m", 1), "m")
    assert "nothing is there (404)" in message_of(f"s3://{BUCKET}/absent")
    assert "(404)" in message_of("s3://no-such-bucket/m")
    assert "none of config.json" in message_of(f"{web.url}/absent")
    assert "no such file or folder there (404)" in message_of(f"{web.url}/m/x.safetensors")
    web.statuses["/m/config.json"] = 403
    assert "access is denied (403)" in message_of(address)
    web.statuses["/m/config.json"] = 503
    assert "cannot be reached (status 503)" in message_of(address)
    web.statuses.clear()
    web.ranges = False
    monkeypatch.setattr(models, "_BLOCK", 1000)
    assert "parts of a file (Range)" in message_of(address)
    assert "a login or a query" in message_of("https://me:secret@127.0.0.1/m")
    assert "secret" not in message_of("https://me:secret@127.0.0.1/m")
    assert "a login or a query" in message_of(f"{web.url}/m/{NAME}?X-Amz-Signature=1")
    assert "no kind of address: nothing://" in message_of("nothing://x/y")
    web.stop()
    assert "cannot be reached" in message_of(address)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "there are no credentials" in message_of(f"s3://{BUCKET}/absent")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    registry: Any = sys.modules[fsspec.filesystem.__module__]
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "pip install 'merge-cli[remote]'" in message_of("s3://bucket/m")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "pip install gcsfs" in message_of("gs://bucket/m")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "needs fsspec" in message_of("s3://bucket/m")


def checkpoint(folder: Path, seed: int) -> Path:
    """What a training run saves, a file for each tensor, with an optimizer's state."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {name: {"exp_avg": tensor.float()} for name, tensor in weights(seed).items()}
    content = {"model": weights(seed), "optim": state}
    save(content, storage_writer=FileSystemWriter(folder, single_file_per_rank=False), no_dist=True)
    (folder / "config.json").write_text(json.dumps(llama_config(layers=2)))
    return folder


@pytest.mark.filterwarnings("ignore")  # torch's own, of saving without processes
def test_a_distributed_checkpoint(tmp_path: Path, s3: S3Server, web: WebServer) -> None:
    one, two = checkpoint(tmp_path / "one", 1), checkpoint(tmp_path / "two", 2)
    first, second = s3.add(one, "dcp/one"), web.add(two, "two")
    source = opened(first)
    parts = [*source.header_bytes]
    assert len(parts) == len(weights(1)) < len([*one.glob("*.distcp")])  # the optimizer's are not
    assert not any(source.remote.is_cached(part) for part in parts if source.remote)
    expected = soup(tmp_path / "expected", str(one), str(two))
    assert same_bytes(soup(tmp_path / "out", first, second), expected)
    sent = [path for _, path, _, sent in web.requests if path.endswith(".distcp") and sent]
    assert {path.rpartition("/")[2] for path in sent} == {*opened(second).header_bytes}


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_that_does_not_hold(tmp_path: Path, s3: S3Server) -> None:
    folder = checkpoint(tmp_path / "dcp", 1)
    part = next(path for path in sorted(folder.glob("*.distcp")) if path.stat().st_size > 2000)
    content = part.read_bytes()
    part.write_bytes(b"x" * len(content))
    assert "a part is no file of torch's" in message_of(s3.add(folder, "broken"))
    part.unlink()
    assert "is missing" in message_of(s3.add(folder, "missing"))
    (folder / ".metadata").write_bytes(b"x")
    assert ".metadata" in message_of(s3.add(folder, "metadata"))


def test_a_problem_has_its_line(tmp_path: Path, s3: S3Server) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: soup\nmodels:\n  - model: s3://{BUCKET}/absent\n")
    failed(cli("plan", recipe), 3, "r.yaml:3:5", "nothing is there (404)")


def test_names_outside_of_the_folder_are_not_read(tmp_path: Path, web: WebServer) -> None:
    folder = model(tmp_path / "m", 1)
    index = {"weight_map": {"w": "../../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.unlink(folder / NAME)
    assert "outside" in message_of(web.add(folder, "m"))


def test_equal_models_are_one(tmp_path: Path, web: WebServer) -> None:
    address = web.add(model(tmp_path / "m", 1), "m")
    assert opened(address).identity == opened(f"{address}/").identity
    remote: Any = opened(address).remote
    assert isinstance(remote, RemoteModel)
    assert opened(address).commits == {}
