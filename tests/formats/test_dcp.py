"""Distributed checkpoints, written by two real processes, against torch's own reader."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save

import merge_cli
from merge_cli.checkpoint.dtypes import torch_dtype
from merge_cli.checkpoint.tensors import Tensor, reading
from merge_cli.conversion.run import convert
from merge_cli.errors import CorruptFileError, MergeCliError, MismatchError, SourceError, UsageError
from merge_cli.formats.dcp.files import METADATA
from merge_cli.formats.dcp.model import model_names, open_checkpoint
from merge_cli.formats.inert import load_inert
from merge_cli.options import MergeOptions
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.system.untrusted import Unreadable
from tests.support.dcp_writer import config
from tests.support.paths import ROOT
from tests.support.tiny import read_model

OPTIONS = MergeOptions(device="cpu", threads=1)
# torch warns of its own classes while it reads a checkpoint back without processes.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def run(kind: str, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.support.dcp_writer", kind, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, f"{folder}-rendezvous", str(rank), "2"], cwd=ROOT, env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of two steps, `step-0` and `step-1`."""
    folder = tmp_path_factory.mktemp("fsdp")
    run("fsdp", folder)
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut") / "checkpoint"
    run("sharded", folder)
    return folder


def loaded(checkpoint: Path, tmp_path: Path) -> Any:
    """What torch reads."""
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt", weights_only=False)


def values(tensor: Tensor, seed: int = 0) -> torch.Tensor:
    """A tensor, read in spans of any length."""
    chance, start = random.Random(seed), 0
    width = tensor.nbytes // tensor.size
    raw = bytearray(tensor.nbytes)
    with reading() as read:
        while start < tensor.size:
            stop = min(tensor.size, start + chance.randint(1, max(2, tensor.size // 3)))
            tensor.fill(read, start, memoryview(raw)[start * width : stop * width])
            start = stop
    return torch.frombuffer(raw, dtype=torch_dtype(tensor.dtype)).view(tensor.shape)


def test_a_trained_model(steps: Path, tmp_path: Path) -> None:
    model = open_checkpoint(steps / "step-1", "m")
    expected = loaded(steps / "step-1", tmp_path)["model"]
    assert model.tensors.keys() == expected.keys()
    for name, tensor in model.tensors.items():
        assert torch.equal(values(tensor), expected[name]), name
    assert any(name.startswith("optim.") for name in model.left_out)
    assert "step" in model.left_out


@pytest.mark.parametrize("seed", range(4))
def test_any_cut(cut: Path, seed: int) -> None:
    model = open_checkpoint(cut, "m")
    assert len(model.tensors["columns"].stored) == 2
    for name, tensor in model.tensors.items():
        expected = torch.arange(tensor.size, dtype=torch.float32).view(tensor.shape)
        assert torch.equal(values(tensor, seed), expected), name


def test_converted_and_loaded(steps: Path, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path / "config")
    out = convert(str(steps / "step-1"), tmp_path / "out", config=str(tmp_path / "config"))
    expected = loaded(steps / "step-1", tmp_path)["model"]
    read = read_model(out.path)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert any("others are left out" in note for note in out.notes)
    net = hf.LlamaForCausalLM.from_pretrained(out.path, dtype=torch.bfloat16)
    assert torch.equal(net.lm_head.weight, expected["lm_head.weight"])
    # With its config beside it, it needs no other model.
    shutil.copytree(steps / "step-1", tmp_path / "own")
    shutil.copy(tmp_path / "config" / "config.json", tmp_path / "own")
    own = convert(str(tmp_path / "own"), tmp_path / "again", dtype="float32")
    assert all(
        torch.equal(tensor, expected[name].float()) for name, tensor in read_model(own.path).items()
    )


def test_a_config_that_does_not_fit(steps: Path, tmp_path: Path) -> None:
    other = config()
    other.num_hidden_layers = 3
    other.save_pretrained(tmp_path / "config")
    with pytest.raises(MismatchError, match=r"layers\.2\..*made up"):
        convert(str(steps / "step-1"), tmp_path / "out", config=str(tmp_path / "config"))
    with pytest.raises(UsageError, match="no config.json"):
        convert(str(steps / "step-1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_are_averaged(steps: Path, tmp_path: Path) -> None:
    """Two checkpoints as they are, against the average of what torch reads."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: soup\nmodels: [{{model: {steps / 'step-0'}}}, "
        f"{{model: {steps / 'step-1'}}}]\ndtype: float32\n"
    )
    merged = read_model(merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS).path)
    first, second = (loaded(steps / f"step-{step}", tmp_path)["model"] for step in range(2))
    for name, tensor in merged.items():
        expected = (first[name].double() + second[name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([("model", "model.norm.weight"), ("model", "lm_head.weight")],
         ["model.norm.weight", "lm_head.weight"]),
        ([("model.norm.weight",), ("lm_head.weight",)], ["model.norm.weight", "lm_head.weight"]),
        ([("model.norm.weight",), ("model.embed.w",)], ["model.norm.weight", "model.embed.w"]),
        ([("app", "model", "model.norm.weight"), ("app", "optim", "state.model.norm.weight.step")],
         ["model.norm.weight"]),
        ([("model", "_orig_mod.model.norm.weight"), ("optimizer", "x")], ["model.norm.weight"]),
        ([("model.model.norm.weight",), ("optim.state.a",)], ["model.norm.weight"]),
        ([("optim", "state.a.exp_avg")], []),
    ],
)  # fmt: skip
def test_which_tensors_are_the_models(paths: list[tuple[str, ...]], names: list[str]) -> None:
    found = model_names({str(number): path for number, path in enumerate(paths)})
    assert list(found.values()) == names


class Malicious:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def copied(checkpoint: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A copy to be spoiled, and its metadata."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy", pickle.loads((checkpoint / METADATA).read_bytes())


def test_nothing_in_a_pickle_runs(cut: Path, tmp_path: Path) -> None:
    folder, metadata = copied(cut, tmp_path)
    metadata.planner_data = Malicious(tmp_path / "ran")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptFileError, match="which the format has not"):
        open_checkpoint(folder, "m")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not a pickle",
        b"\x80\x02N.",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place in the memo that would take 32 GB
        b"\x80\x02" + b"]" * 2**25 + b".",
        b"\x80\x02(" + b"\x85" * 10 + b".",
        b"\x80\x02ctorch\nload\nq\x00.",
        b"\x80\x02cbuiltins\neval\n.",
        b"\x80\x02X\x04\x00\x00\x00fileQ.",
    ],
    ids=["empty", "text", "none", "memo", "lists", "tuples", "load", "eval", "reference"],
)
def test_pickles_that_are_none(cut: Path, tmp_path: Path, raw: bytes) -> None:
    folder, _ = copied(cut, tmp_path)
    (folder / METADATA).write_bytes(raw)
    with pytest.raises(CorruptFileError):
        open_checkpoint(folder, "m")


def test_a_name_that_is_not_allowed() -> None:
    with pytest.raises(Unreadable, match=r"os\.system"):
        load_inert(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", lambda *_: False)


def entry(metadata: Any, name: str = "rows") -> tuple[Any, Any]:
    """A tensor's entry, and where its first part is."""
    place = next(value for key, value in metadata.storage_data.items() if key.fqn == name)
    return metadata.state_dict_metadata[name], place


def spoil(change: Callable[[Any, Any], None], name: str = "rows") -> Callable[[Any], None]:
    def apply(metadata: Any) -> None:
        change(*entry(metadata, name))

    return apply


def set_size(tensor: Any, place: Any) -> None:
    tensor.size = torch.Size((8, 5))


def set_offset(tensor: Any, place: Any) -> None:
    tensor.chunks[1].offsets = torch.Size((3, 0))


def set_dtype(tensor: Any, place: Any) -> None:
    tensor.properties.dtype = torch.float16


def drop_part(tensor: Any, place: Any) -> None:
    del tensor.chunks[0]


def set_file(tensor: Any, place: Any) -> None:
    place.relative_path = "../x.distcp"


def set_missing(tensor: Any, place: Any) -> None:
    place.relative_path = "__9_9.distcp"


def set_length(tensor: Any, place: Any) -> None:
    place.length = 2**50


def set_start(tensor: Any, place: Any) -> None:
    place.offset += 1


def set_negative(tensor: Any, place: Any) -> None:
    place.offset = -1


def set_transform(tensor: Any, place: Any) -> None:
    place.transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_size, "its parts end at 7"),
        (set_offset, "is not said"),
        (set_dtype, "stored as F32, not as F16"),
        (drop_part, "overlap or leave a gap"),
        (set_file, "no .distcp file of the checkpoint"),
        (set_missing, "cannot be read"),
        (set_length, "truncated"),
        (set_start, "no file of torch's|a part"),
        (set_negative, "must be from 0"),
        (set_transform, "compressed"),
    ],
)
def test_metadata_that_lies(
    cut: Path, tmp_path: Path, change: Callable[[Any, Any], None], message: str
) -> None:
    folder, metadata = copied(cut, tmp_path)
    spoil(change)(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptFileError, match=message):
        open_checkpoint(folder, "m")


def test_another_tensor_in_its_place(cut: Path, tmp_path: Path) -> None:
    folder, metadata = copied(cut, tmp_path)
    _, rows = entry(metadata, "rows")
    _, columns = entry(metadata, "columns")
    rows.offset, rows.length = columns.offset, columns.length
    rows.relative_path = columns.relative_path
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptFileError, match="not of the shape"):
        open_checkpoint(folder, "m")


def test_any_damage_is_an_error_or_a_model(cut: Path, tmp_path: Path) -> None:
    folder, _ = copied(cut, tmp_path)
    chance, refused = random.Random(0), 0
    names = [METADATA, *(path.name for path in cut.glob("*.distcp"))]
    for _ in range(150):
        name = chance.choice(names)
        raw = bytearray((cut / name).read_bytes())
        for _ in range(chance.randint(1, 6)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        if chance.random() < 0.2:
            del raw[chance.randrange(len(raw)) :]
        (folder / name).write_bytes(raw)
        try:
            model = open_checkpoint(folder, "m")
            for tensor in model.tensors.values():
                values(tensor)
        except MergeCliError:
            refused += 1
        (folder / name).write_bytes((cut / name).read_bytes())
    assert 30 < refused < 150


def test_a_checkpoint_of_an_optimizer_alone(tmp_path: Path) -> None:
    save({"optim": {"a": torch.zeros(3)}}, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    with pytest.raises(SourceError, match="without weights"):
        open_source(ModelRef(str(tmp_path / "c")), tmp_path)
