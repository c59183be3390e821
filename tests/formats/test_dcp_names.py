"""Distributed checkpoints with Megatron's names: cut and renamed as names.yaml says."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import merge_cli
from merge_cli.conversion.run import convert
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.dcp.metadata import parse_metadata
from merge_cli.formats.dcp.names import parse_rules
from merge_cli.options import MergeOptions
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.system.untrusted import Unreadable
from tests.support.dcp_writer import config
from tests.support.paths import ROOT
from tests.support.tiny import read_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
# The page's own example.
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
NAMES = re.findall(r"```yaml\n(# names\.yaml.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "iter_0000100"
    command = [sys.executable, "-m", "tests.support.dcp_writer", "megatron", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, f"{folder}-rendezvous", str(rank), "2"], cwd=ROOT,
                         env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(saved, copy)
    config().save_pretrained(copy)
    (copy / "names.yaml").write_text(NAMES)
    return copy


def expected() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(hf.LlamaForCausalLM(config()).to(torch.bfloat16).state_dict())


def opened(folder: Path) -> Any:
    return open_source(ModelRef(str(folder)), folder.parent)


def test_a_megatron_checkpoint_is_a_llama(folder: Path, tmp_path: Path) -> None:
    out = convert(str(folder), tmp_path / "out").path
    read, own = read_model(out), expected()
    assert read.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(read[name], tensor), name
    hf.LlamaForCausalLM.from_pretrained(out)


def test_a_merge_of_two(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    recipe = {"merge_method": "soup", "models": [{"model": str(folder)}, {"model": str(other)}]}
    options = MergeOptions(device="cpu", threads=2)
    out = merge_cli.merge(recipe, tmp_path / "out", options=options).path
    assert all(torch.equal(read_model(out)[name], tensor) for name, tensor in expected().items())


def test_layers_read_their_own_bytes(folder: Path) -> None:
    tensors = opened(folder).tensors
    norm = tensors["model.layers.1.input_layernorm.weight"]
    assert sum(ref.nbytes for ref in norm.stored) == norm.nbytes
    projection = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert sum(ref.nbytes for ref in projection.stored) == projection.nbytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("mlp.linear_fc2", "mlp.other"), r"does not say what decoder\.layers\.mlp\.linear_fc2"),
        (("lm_head.weight", "model.embed_tokens.weight"), "two tensors become model.embed_tokens"),
        (("{vocabulary: lm_head.weight}", "[a, b, c]"), "128 rows are not 3 equal parts"),
        (("model.norm.weight", "model.layers.{layer}.norm"), "has no dimension of layers"),
    ],
)
def test_names_that_do_not_fit(folder: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in NAMES
    (folder / "names.yaml").write_text(NAMES.replace(*change))
    with pytest.raises(SourceError, match=words):
        opened(folder)


def test_heads_that_do_not_fit(folder: Path) -> None:
    settings = config()
    settings.num_key_value_heads = 3
    settings.to_json_file(folder / "config.json")
    with pytest.raises(SourceError, match="not those of 4 heads in 3 groups"):
        opened(folder)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"needed from config\.json beside it"):
        opened(folder)


def test_without_names_a_note_says_what_is_missing(folder: Path) -> None:
    (folder / "names.yaml").unlink()
    assert "names.yaml beside it" in " ".join(opened(folder).notes)
    (folder / "names.yaml").write_text("- a list")
    with pytest.raises(CorruptFileError, match="must say for each tensor"):
        opened(folder)


@pytest.mark.parametrize(
    "document",
    [
        {"a": {"other": "b"}},
        {"a": []},
        {"a.{layer}": "b"},
        {"a": {"qkv": ["q", "k"]}},
        {"a": ["b.{layer}", "c"]},
        {"a": {"vocabulary": ["b", "c"]}},
    ],
)
def test_rules_that_say_nothing(document: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        parse_rules(document)


def test_rules_of_numbered_layers() -> None:
    rule, left_out = parse_rules({"layers.{layer}.w": "model.{layer}.w", "buffer": "null"})
    assert rule.match("layers.12.w") == {"layer": "12"}
    assert rule.match("layers.x.w") is None
    assert (left_out.kind, left_out.targets) == ("nothing", ())


def test_metadata_of_megatron_core(saved: Path) -> None:
    """Its class has another name, and one attribute more."""
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.mcore_data = {"decoder.final_layernorm.weight": {"shape": (32,)}}
    raw = pickle.dumps(metadata, protocol=2)
    named = raw.replace(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
    )
    assert named != raw
    assert parse_metadata(named).tensors == parse_metadata(raw).tensors


def test_an_archive_of_nemo(tmp_path: Path) -> None:
    (tmp_path / "m.nemo").write_bytes(b"x")
    with pytest.raises(SourceError, match="unpack it with tar"):
        opened(tmp_path / "m.nemo")
