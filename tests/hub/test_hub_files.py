"""One file of a Hub repository as a model: GGUF by its path or its quantisation, weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.conversion.run import convert
from merge_cli.errors import SourceError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef, hub_file, hub_id, parse_reference
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source
from tests.support.gguf_files import write_gguf
from tests.support.hub_server import HubServer
from tests.support.tiny import llama_config, llama_tensors, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path: Path, hub: HubServer) -> Path:
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    write_gguf(folder / "tiny.f16.gguf", dtype="F16")
    write_gguf(folder / "sub" / "tiny-BF16.gguf", dtype="BF16")
    hub.add("org/tiny-GGUF", folder, tag="v1")
    return folder


def opened(name: str) -> Source:
    return open_source(parse_reference(name, Path.cwd()), Path.cwd())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/m/x.gguf", ("org/m", "x.gguf")),
        ("hf://org/m/sub/x.safetensors", ("org/m", "sub/x.safetensors")),
        ("org/m:Q4_K_M", ("org/m", ":Q4_K_M")),
        ("org/m", None),
        ("org/m/sub", None),
        ("org/m/../x.gguf", None),
        ("name.gguf", None),
        ("./m/x/y.gguf", None),
    ],
)
def test_spellings(text: str, expected: tuple[str, str] | None) -> None:
    assert hub_file(text) == expected
    assert expected is None or hub_id(text) is None


@pytest.mark.parametrize(
    "name", ["org/tiny-GGUF/tiny.f16.gguf", "org/tiny-GGUF:F16", "hf://org/tiny-GGUF:f16@v1"]
)
def test_a_plan_reads_the_header_alone(files: Path, hub: HubServer, name: str) -> None:
    size = (files / "tiny.f16.gguf").stat().st_size
    source = opened(name)
    assert hub.sent("tiny.f16.gguf") <= min(size, 2**18)
    assert not (source.root / "tiny.f16.gguf").exists()  # a link to what is not there yet
    assert source.config["model_type"] == "llama"
    assert (source.root / "tokenizer.json").is_file()
    assert source.download_size(["tiny.f16.gguf"]) == size
    assert source.revision


def test_a_merge_is_that_of_the_file(files: Path, hub: HubServer, tmp_path: Path) -> None:
    text = """
merge_method: linear
models:
  - {model: "org/tiny-GGUF:F16", parameters: {weight: 0.5}}
  - model: {model: {path: org/tiny-GGUF, revision: v1, gguf_file: sub/tiny-BF16.gguf}}
    parameters: {weight: 0.5}
"""
    (tmp_path / "r.yaml").write_text(text)
    merged = merge_cli.merge(tmp_path / "r.yaml", tmp_path / "out", options=OPTIONS).path
    local = text.replace("org/tiny-GGUF:F16", str(files / "tiny.f16.gguf")).replace(
        "{model: {path: org/tiny-GGUF, revision: v1, gguf_file: sub/tiny-BF16.gguf}}",
        str(files / "sub" / "tiny-BF16.gguf"),
    )
    (tmp_path / "l.yaml").write_text(local)
    expected = merge_cli.merge(tmp_path / "l.yaml", tmp_path / "local", options=OPTIONS).path
    name = "model.safetensors"
    assert (merged / name).read_bytes() == (expected / name).read_bytes()
    resolved = load_recipe(merged / "merge_recipe.yaml")
    assert all(spec.model.revision for spec in resolved.models)
    again = merge_cli.merge(resolved, tmp_path / "again", options=OPTIONS).path
    assert (merged / name).read_bytes() == (again / name).read_bytes()


def test_a_file_is_converted(files: Path, hub: HubServer, tmp_path: Path) -> None:
    first = convert("org/tiny-GGUF:F16", tmp_path / "out").path
    second = convert(str(files / "tiny.f16.gguf"), tmp_path / "local").path
    left, right = (load_file(path / "model.safetensors") for path in (first, second))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_what_is_not_there_is_named(files: Path, hub: HubServer) -> None:
    with pytest.raises(SourceError, match=r"no GGUF files of it are called Q4_K_M.*tiny\.f16"):
        opened("org/tiny-GGUF:Q4_K_M")
    with pytest.raises(SourceError, match=r"no such file.*Did you mean 'tiny\.f16\.gguf'"):
        opened("org/tiny-GGUF/tiny.f61.gguf")
    with pytest.raises(SourceError, match=r"Name the file itself: org/tiny-GGUF/"):
        opened("org/tiny-GGUF")
    write_gguf(files / "other.f16.gguf")
    hub.add("org/two", files)
    with pytest.raises(SourceError, match="2 GGUF files of it are called F16"):
        opened("org/two:F16")


def test_weights_alone(hub: HubServer, tmp_path: Path) -> None:
    tensors = {n: t.half() for n, t in llama_tensors(torch.Generator(), layers=1).items()}
    folder = tmp_path / "m"
    folder.mkdir()
    save_file(tensors, folder / "flux.safetensors")
    torch.save({"state_dict": tensors}, folder / "flux.ckpt")
    hub.add("org/flux", folder)
    recipe = {
        "merge_method": "soup",
        "models": [{"model": f"org/flux/flux.{end}"} for end in ("safetensors", "ckpt")],
    }
    assert len(make_plan(load_recipe(recipe)).tasks) == len(tensors)
    out = merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS).path  # fmt: skip
    read = load_file(out / "flux.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    whole = write_model(tmp_path / "whole", tensors, llama_config(layers=1))
    hub.add("org/whole", whole)
    source = opened("org/whole/model.safetensors")
    assert source.is_safetensors
    assert source.identity == open_source(ModelRef("org/whole"), tmp_path).identity
