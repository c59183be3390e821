"""The lane of a device, with a device made of host memory that is strict about waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.engine import device_worker, loop, pool
from merge_cli.engine.device_worker import StagedWorker
from merge_cli.engine.files import Files
from tests.support.devices import StrictTransfers
from tests.support.merges import RECIPES, digest, write_recipe
from tests.support.tiny import Family, llama_config, llama_tensors, merge, write_model


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[StagedWorker]:
    """Merges run on staged lanes, which are collected here."""
    made: list[StagedWorker] = []

    def factory(files: Files, device: Any, arithmetic: str, room: Any) -> Any:
        def worker(number: int) -> StagedWorker:
            made.append(StagedWorker(files, StrictTransfers(), 256))
            return made[-1]

        return worker

    monkeypatch.setattr(loop, "worker_factory", factory)
    monkeypatch.setattr(pool, "choose_arithmetic", lambda plan: ("torch", "a fake device"))
    return made


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_same_bytes_as_on_the_host(
    family: Family, tmp_path: Path, case: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    recipe = family.recipe(case.partition(" ")[0], **{**RECIPES[case], "dtype": dtype})
    merge(recipe, tmp_path / "host")
    workers = request.getfixturevalue("workers")
    merge(recipe, tmp_path / "staged", threads=3)
    assert digest(tmp_path / "host") == digest(tmp_path / "staged")
    assert len(workers) >= 3
    assert sum(worker.clock.bytes_written for worker in workers) > 0


def test_fp8_the_same_bytes_as_on_the_host(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    generator = torch.Generator().manual_seed(0)
    write_model(
        tmp_path / "a",
        llama_tensors(generator, layers=1, width=128),
        llama_config(layers=1, width=128),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: soup\nmodels: [{model: a}, {model: a}]\nout_dtype: fp8\n")
    merge(recipe, tmp_path / "host")
    request.getfixturevalue("workers")
    merge(recipe, tmp_path / "staged", threads=2)
    assert digest(tmp_path / "host") == digest(tmp_path / "staged")


def test_buffers_stay_small(family: Family, tmp_path: Path, workers: list[StagedWorker]) -> None:
    merge(write_recipe(family, "ties"), tmp_path / "out", threads=2)
    transfers: list[Any] = [worker._transfers for worker in workers]  # the simulated ones count
    sizes = [simulated.largest for simulated in transfers]
    assert max(sizes) <= 256 * 4 * 4  # a block of the base and three sources, float32


def test_a_buffer_in_flight_is_noticed(family: Family) -> None:
    """The fake is as strict as it says."""
    transfers = StrictTransfers()
    host = transfers.host(8)
    transfers.up(host)
    host.zero_()
    with pytest.raises(AssertionError, match="used again"):
        transfers.wait_up()
    below = transfers.host(4)
    transfers.down(torch.arange(4, dtype=torch.uint8), below)
    assert below.tolist() == [0x55] * 4
    transfers._up.clear()
    transfers.wait()
    assert below.tolist() == [0, 1, 2, 3]


@pytest.mark.cuda
def test_cuda_transfers_overlap_and_arrive() -> None:
    transfers = device_worker.CudaTransfers(0)
    with transfers.active():
        host = transfers.host(1 << 20)
        host.copy_(torch.randint(0, 256, (1 << 20,), dtype=torch.uint8))
        back = transfers.host(1 << 20)
        transfers.down(transfers.up(host), back)
        transfers.wait()
    assert torch.equal(host, back)
