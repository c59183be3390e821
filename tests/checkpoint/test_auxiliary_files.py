"""Files beside the weights: links that lead out, code that is named, folders of modules.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.checkpoint.auxiliary_files import leads_out
from merge_cli.errors import CorruptFileError, MismatchError, SourceError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.publishing.package import pack
from tests.support.hub_server import HubServer
from tests.support.tiny import Family, llama_family, merge, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.json"
    path.write_text("{}")
    return path


def notes(family: Family, **keys: Any) -> str:
    return "\n".join(make_plan(load_recipe(family.recipe("linear", base=False, **keys))).notes)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "generation_config.json", "chat_template.jinja", "preprocessor_config.json",
     "modeling_x.py", "config.json", "additional_chat_templates/x.jinja", "1_Pooling/config.json"],
)  # fmt: skip
def test_a_link_out_of_the_folder_is_no_companion(name: str, tmp_path: Path, secret: Path) -> None:
    family = llama_family(tmp_path / "models")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]
    (family.folder / "a" / "modules.json").write_text(json.dumps(modules))
    path = family.folder / "a" / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        secret.write_bytes(path.read_bytes())
        path.unlink()
    path.symlink_to(secret)
    recipe = family.recipe("linear", base=False, models=[{"weight": 1}] * 3)
    with pytest.raises(SourceError, match="out of the model's folder") as raised:
        make_plan(load_recipe(recipe))
    assert name in str(raised.value)


def test_a_whole_folder_that_is_a_link_out(tmp_path: Path) -> None:
    family = llama_family(tmp_path / "models")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("secret")
    (family.folder / "a" / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=r"additional_chat_templates/x\.jinja"):
        make_plan(load_recipe(family.recipe("linear", base=False, models=[{"weight": 1}] * 3)))


COPIED = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
          "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "1_Pooling/config.json"]  # fmt: skip


@pytest.fixture
def every_file(tmp_path: Path) -> Family:
    """Models of which the first has every JSON file that is copied."""
    family = llama_family(tmp_path / "models")
    folder = family.folder / "a"
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    vocabulary = {f"t{i}": i for i in range(48)}
    for name in COPIED[1:]:
        content = {"model": {"vocab": vocabulary}} if name == "tokenizer.json" else {"ö": 1}
        content = {} if name == "added_tokens.json" else content
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return family


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", COPIED)
def test_json_is_written_as_utf8(
    every_file: Family, tmp_path: Path, name: str, encoding: str
) -> None:
    file = every_file.folder / "a" / name
    text = file.read_text(encoding="utf-8")
    file.write_text(text, encoding=encoding)
    recipe = every_file.recipe("linear", base=False, models=[{"weight": 1}] * 3)
    merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == text.encode()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", COPIED)
def test_json_that_would_not_load_is_refused(every_file: Family, name: str, large: bool) -> None:
    file = every_file.folder / "a" / name
    text = file.read_text(encoding="utf-8")
    padding = " " * 2**20 if large else ""
    recipe = every_file.recipe("linear", base=False, models=[{"weight": 1}] * 3)
    comma = ", " if len(text) > 2 else ""
    file.write_text(f'{text[:-1]}{comma}"eps": NaN{padding}}}', encoding="utf-8")
    with pytest.raises(SourceError, match="eps is NaN"):
        make_plan(load_recipe(recipe))
    file.write_bytes(text.encode() + padding.encode() + b"\xff")
    with pytest.raises(SourceError, match="is not UTF-8 text"):
        make_plan(load_recipe(recipe))


def test_links_inside_and_links_of_weights(tmp_path: Path) -> None:
    """Shards are read, not copied: on servers they are often links."""
    family = llama_family(tmp_path / "models")
    folder = family.folder / "a"
    (folder / "own.json").write_text('{"own": 1}')
    (folder / "generation_config.json").symlink_to("own.json")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "linked").symlink_to(family.folder)
    recipe = tmp_path / "linked" / family.recipe(
        "linear", base=False, models=[{"weight": 1}] * 3).name  # fmt: skip
    merge(recipe, tmp_path / "out")
    copied = tmp_path / "out" / "generation_config.json"
    assert json.loads(copied.read_text()) == {"own": 1}
    assert not copied.is_symlink()


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    root = cache / "snapshots" / "abc"
    root.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1").write_text("{}")
    other = tmp_path / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "2").write_text("{}")
    (root / "tokenizer.json").symlink_to("../../blobs/1")
    (root / "vocab.json").symlink_to(other / "2")
    (root / "merges.txt").symlink_to("../../../models--org--private/blobs/2")
    assert not leads_out(root / "tokenizer.json", root)
    assert leads_out(root / "vocab.json", root)
    assert leads_out(root / "merges.txt", root)


def test_links_are_not_pushed(tmp_path: Path, secret: Path) -> None:
    family = llama_family(tmp_path / "models")
    merge(family.recipe("linear", base=False, models=[{"weight": 1}] * 3), tmp_path / "out")
    (tmp_path / "out" / "notes.json").symlink_to(secret)
    with pytest.raises(SourceError, match=r"notes\.json"):
        pack(tmp_path / "out", "org/name")


def test_code_that_a_config_names_is_told(tmp_path: Path) -> None:
    family = llama_family(tmp_path)
    path = family.folder / "a" / "config.json"
    code = {"AutoConfig": "configuration_x.C", "AutoTokenizer": ["org/x--tok.T", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    told = notes(family, models=[{"weight": 1}] * 3)
    assert "configuration_x.py" in told
    assert "is not there" in told
    assert "tok.py" not in told


# sentence-transformers


def sentences(folder: Path, seed: int, *, dense: bool = True, **files: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"embeddings.word_embeddings.weight": torch.randn(20, 8, generator=generator)}
    write_model(folder, tensors, {"model_type": "bert", "dtype": "float32"})
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "N"}
    modules = [{"idx": i, "path": p, "type": k} for i, (p, k) in enumerate(kinds.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in ("1_Pooling", "2_Dense"):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"of": seed}))
    weights = {"linear.weight": torch.randn(4, 8, generator=generator)}
    if dense:
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    for name, text in files.items():
        (folder / name).write_text(text)
    return {**tensors, "2_Dense/linear.weight": weights["linear.weight"]}


RECIPE = {"merge_method": "linear",
          "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]}  # fmt: skip


def write(folder: Path, recipe: dict[str, Any] = RECIPE) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def test_modules_bring_their_folders_and_weights(tmp_path: Path) -> None:
    a, b = sentences(tmp_path / "a", 1), sentences(tmp_path / "b", 2)
    (tmp_path / "a" / "2_Dense" / "run.py").write_text("code")
    (tmp_path / "a" / "onnx").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "onnx" / "model.safetensors")
    out = merge_cli.merge(write(tmp_path), tmp_path / "out", options=OPTIONS).path
    made = load_file(out / "model.safetensors")
    assert set(made) == {"embeddings.word_embeddings.weight"}
    dense = load_file(out / "2_Dense" / "model.safetensors")
    name = "2_Dense/linear.weight"
    torch.testing.assert_close(dense["linear.weight"], (a[name] + b[name]) / 2)
    for folder in ("1_Pooling", "2_Dense"):
        assert json.loads((out / folder / "config.json").read_text()) == {"of": 1}
    assert not (out / "2_Dense" / "run.py").exists()
    assert not (out / "onnx").exists()
    again = merge_cli.merge(out / "merge_recipe.yaml", tmp_path / "again", options=OPTIONS).path
    assert (again / "2_Dense" / "model.safetensors").read_bytes() == (
        out / "2_Dense" / "model.safetensors").read_bytes()  # fmt: skip


def test_shards_of_a_model_with_modules(tmp_path: Path) -> None:
    a, b = sentences(tmp_path / "a", 1), sentences(tmp_path / "b", 2)
    merge_cli.merge(write(tmp_path), tmp_path / "out", options=OPTIONS, shard_size=64)
    name = "2_Dense/linear.weight"
    dense = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    torch.testing.assert_close(dense["linear.weight"], (a[name] + b[name]) / 2)


def test_modules_with_the_model_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """As sentence-transformers laid it out first: 0_Transformer holds the model itself."""
    for seed, name in enumerate("ab"):
        folder = tmp_path / name
        write_model(folder / "0_Transformer", {"w": torch.full((2, 2), float(seed))})
        (folder / "0_Transformer" / "vocab.txt").write_text("word")
        modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}]
        (folder / "modules.json").write_text(json.dumps(modules))
    out = merge_cli.merge(write(tmp_path), tmp_path / "out", options=OPTIONS).path
    made = load_file(out / "0_Transformer" / "model.safetensors")
    assert torch.equal(made["w"], torch.full((2, 2), 0.5))
    assert (out / "0_Transformer" / "config.json").is_file()
    assert (out / "0_Transformer" / "vocab.txt").is_file()


def test_a_dense_layer_that_one_lacks(tmp_path: Path) -> None:
    sentences(tmp_path / "a", 1)
    sentences(tmp_path / "b", 2, dense=False)
    with pytest.raises(MismatchError, match="2_Dense/linear"):
        make_plan(load_recipe(write(tmp_path)))


def test_a_pickled_dense_layer_is_refused(tmp_path: Path) -> None:
    sentences(tmp_path / "a", 1, dense=False)
    sentences(tmp_path / "b", 2, dense=False)
    (tmp_path / "a" / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="pickled"):
        make_plan(load_recipe(write(tmp_path)))


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../b", "a\\b", 3, None])
def test_modules_stay_inside(path: Any, tmp_path: Path) -> None:
    sentences(tmp_path / "a", 1)
    sentences(tmp_path / "b", 2)
    (tmp_path / "a" / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(CorruptFileError, match=r"modules\.json"):
        make_plan(load_recipe(write(tmp_path)))


def test_modules_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    a, b = sentences(tmp_path / "a", 1), sentences(tmp_path / "b", 2)
    for name in "ab":
        root = tmp_path / name
        files = {p.relative_to(root).as_posix(): p.read_bytes()
                 for p in root.rglob("*") if p.is_file()}  # fmt: skip
        hub.add(f"org/{name}", files)
    models = [{"model": f"org/{name}", "parameters": {"weight": 0.5}} for name in "ab"]
    recipe = write(tmp_path, {**RECIPE, "models": models})
    out = merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS).path
    name = "2_Dense/linear.weight"
    dense = load_file(out / "2_Dense" / "model.safetensors")["linear.weight"]
    torch.testing.assert_close(dense, (a[name] + b[name]) / 2)
    assert (out / "1_Pooling" / "config.json").is_file()
