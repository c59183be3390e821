"""The same bytes however it is run: threads, blocks, units, window, shards, interruption."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Family, llama_family, merge, read_model, write_model

import merge_cli
from merge_cli.engine import loop, operands, units
from merge_cli.engine.compute import Computer
from merge_cli.engine.journal import Journal
from merge_cli.engine.memory import MINIMUM_MEMORY, estimated_peak, window_bytes
from merge_cli.engine.pipeline import Pipeline, Window
from merge_cli.engine.statistics import TensorStats
from merge_cli.engine.units import Unit, cut_units
from merge_cli.errors import Interrupted, UsageError
from merge_cli.kernels import reduce

RECIPES: dict[str, dict[str, Any]] = {
    "soup": {"base": False, "parameters": {"weight": 0.7}},
    "task_arithmetic": {"parameters": {"weight": 0.7}},
    "ties": {"parameters": {"density": 0.53}},
    "ties model": {"parameters": {"density": 0.53, "trim": "model"}},
    "ties paper": {"parameters": {"semantics": "paper"}},
    "dare": {"parameters": {"density": 0.53, "rescale": "l1"}},
    "dare_ties": {"parameters": {"density": 0.53}},
    "slerp": {"base": False, "models": [None, None], "parameters": {"t": 0.4}},
    "passthrough": {"base": False, "models": [{"scale": 1.5}]},
}


def write_recipe(family: Family, case: str) -> Path:
    return family.recipe(case.partition(" ")[0], **RECIPES[case])


def digest(folder: Path) -> str:
    """SHA-256 over every tensor's name and bytes, whatever file it is in."""
    state = hashlib.sha256()
    for name, tensor in sorted(read_model(folder).items()):
        state.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and blocks so small that even tiny tensors are cut into many."""
    for module in (operands, units, reduce):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(operands, "_CPU_RUNS", 1)
    monkeypatch.setattr(units, "UNIT_BYTES", 1024)


@pytest.mark.parametrize("case", RECIPES)
def test_units_and_blocks(
    family: Family, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut to pieces or whole: elementwise work, prepared tensors, surveys.

    The sums of slerp and of dare's l1 depend on the length of a run, so that both sides share it.
    """
    recipe = write_recipe(family, case)
    merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(reduce, "BLOCK_MULTIPLE", 64)
    merge(recipe, tmp_path / "runs")  # the reference for other runs of the exact sums
    for module in (operands, units):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    tasks = merge_cli.plan(recipe).tasks
    assert len(cut_units(tasks)) > 2 * len(tasks)
    for runs in (1, 3):
        monkeypatch.setattr(operands, "_CPU_RUNS", runs)
        merge(recipe, tmp_path / f"pieces{runs}", threads=runs)
        assert digest(tmp_path / f"pieces{runs}") == digest(tmp_path / "runs")
    if case not in ("slerp", "dare"):
        assert digest(tmp_path / "whole") == digest(tmp_path / "runs")


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("case", ["ties", "dare_ties"])
def test_threads_window_and_shards(family: Family, tmp_path: Path, case: str) -> None:
    recipe = write_recipe(family, case)
    digests = set()
    for i, (threads, shard_size, statistics) in enumerate(
        [(1, 10**9, True), (4, 10**9, False), (3, 2000, True), (2, 1, True)]
    ):
        out = tmp_path / f"out{i}"
        merge(recipe, out, shard_size, threads=threads, statistics=statistics)
        digests.add(digest(out))
    assert len(digests) == 1


def test_inputs_in_shards(tmp_path: Path) -> None:
    outs = []
    for shards in (1, 3):
        family = llama_family(tmp_path / str(shards), shards=shards)
        merge(write_recipe(family, "dare_ties"), tmp_path / f"out{shards}")
        outs.append((tmp_path / f"out{shards}" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize("case", RECIPES)
def test_resolved_recipe_gives_the_same_bytes(family: Family, tmp_path: Path, case: str) -> None:
    first, second = tmp_path / "x" / "first", tmp_path / "y" / "z" / "second"
    merge(write_recipe(family, case), first)
    merge(first / "merge_recipe.yaml", second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_seed_changes_dare_and_is_recorded(family: Family, tmp_path: Path) -> None:
    recipe = merge_cli.load_recipe(write_recipe(family, "dare_ties"))
    for seed in (0, 1):
        merge_cli.merge(recipe.with_seed(seed), tmp_path / str(seed))
    assert digest(tmp_path / "0") != digest(tmp_path / "1")
    assert "seed: 1" in (tmp_path / "1" / "merge_recipe.yaml").read_text()
    merge(tmp_path / "1" / "merge_recipe.yaml", tmp_path / "again")
    assert digest(tmp_path / "1") == digest(tmp_path / "again")


def test_changed_inputs_are_noticed(family: Family, tmp_path: Path) -> None:
    merge(write_recipe(family, "ties"), tmp_path / "out")
    other = {name: tensor * 2 for name, tensor in family.models[0].items()}
    config = json.loads((family.folder / "a" / "config.json").read_text())
    write_model(family.folder / "a", other, config)
    with pytest.raises(
        merge_cli.MergeCliError, match="not the model that this recipe was resolved"
    ):
        merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")


# Resuming


def interrupt(recipe: Path, out: Path, units_done: int = 9, **options: Any) -> None:
    """Merge until exactly so many units are done in this run, then press Ctrl-C."""
    real, seen = Journal.record, 0

    def record(journal: Journal, number: int, stats: TensorStats) -> None:
        nonlocal seen
        real(journal, number, stats)
        seen += 1
        if seen == units_done:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "record", record)
        with pytest.raises(Interrupted, match="The same command resumes"):
            merge(recipe, out, **options)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("case", ["soup", "ties model", "dare", "slerp"])
def test_interrupted_and_resumed(family: Family, tmp_path: Path, case: str) -> None:
    recipe = write_recipe(family, case)
    merge(recipe, tmp_path / "whole")
    for stop in (1, 5, 20):
        interrupt(recipe, tmp_path / "out", stop)
        assert not (tmp_path / "out").exists()
    computed = []
    run = Computer.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Computer,
            "run",
            lambda self, unit, loaded: (computed.append(unit), run(self, unit, loaded))[1],
        )
        result = merge_cli.merge(recipe, tmp_path / "out")
    plan = merge_cli.plan(recipe)
    assert 0 < len(computed) < len(cut_units(plan.tasks)) - 15
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    assert result.report["cost"]["resumed_bytes"] > 0
    whole = json.loads((tmp_path / "whole" / "merge_report.json").read_text())
    assert result.report["statistics"] == whole["statistics"]  # measured across both runs


@pytest.mark.usefixtures("small_steps")
def test_a_journal_of_other_work_is_not_continued(family: Family, tmp_path: Path) -> None:
    interrupt(write_recipe(family, "soup"), tmp_path / "out")
    with pytest.raises(UsageError, match="interrupted merge of another recipe"):
        merge(write_recipe(family, "ties"), tmp_path / "out")
    merge(write_recipe(family, "ties"), tmp_path / "out", fresh=True)
    merge(write_recipe(family, "ties"), tmp_path / "expected")
    assert digest(tmp_path / "out") == digest(tmp_path / "expected")


@pytest.mark.usefixtures("small_steps")
def test_changed_source_is_not_continued(family: Family, tmp_path: Path) -> None:
    """Other weights behind the same header: what was merged before is of no use."""
    recipe = write_recipe(family, "soup")
    interrupt(recipe, tmp_path / "out")
    other = {name: tensor * 2 for name, tensor in family.models[0].items()}
    config = json.loads((family.folder / "a" / "config.json").read_text())
    write_model(family.folder / "a", other, config)
    with pytest.raises(UsageError, match="other inputs"):
        merge(recipe, tmp_path / "out")
    merge(recipe, tmp_path / "out", fresh=True)
    merge(recipe, tmp_path / "expected")
    assert digest(tmp_path / "out") == digest(tmp_path / "expected")


@pytest.mark.usefixtures("small_steps")
def test_overwrite_is_resumable_too(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(family, "soup")
    merge(write_recipe(family, "ties"), tmp_path / "out")
    before = digest(tmp_path / "out")
    recipe = write_recipe(family, "soup")
    options = merge_cli.MergeOptions(overwrite=True)
    interrupt(recipe, tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") == before  # the old model stays until the new one is whole
    merge_cli.merge(recipe, tmp_path / "out", options=options)
    assert digest(tmp_path / "out") != before


@pytest.mark.usefixtures("small_steps")
def test_fsync_marks(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SYNC_BYTES", 1000)
    options = merge_cli.MergeOptions(fsync=True)
    recipe = write_recipe(family, "soup")
    interrupt(recipe, tmp_path / "out", 20, fsync=True)
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_text()
    assert '"synced"' in journal
    # as after a power failure: another boot believes what was synced, and no more
    first, rest = journal.split("\n", 1)
    changed = json.dumps({**json.loads(first), "boot": "another"})
    (tmp_path / "out.partial" / "journal.jsonl").write_text(f"{changed}\n{rest}")
    units_synced = int(re.findall(r'"synced":(\d+)', rest)[-1])
    path = tmp_path / "out.partial" / "journal.jsonl"
    opened = Journal(path, json.loads(first)["key"])
    assert 0 < len(opened.done) == units_synced <= rest.count('"unit"')
    opened.close()
    merge_cli.merge(recipe, tmp_path / "out", options=options)


def test_torn_journal_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "key")
    journal.record(0, TensorStats(count=3))
    journal.record(1, TensorStats(count=4))
    journal.close()
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path, "key")
    assert again.done.keys() == {0}
    again.record(1, TensorStats(count=5))
    again.close()
    last = Journal(path, "key")
    assert last.done[1].count == 5
    last.close()


# The loop


def test_window_bounds_what_is_in_flight() -> None:
    window, stop = Window(100), threading.Event()
    assert window.acquire(60, stop)
    assert window.acquire(40, stop)
    waiting = threading.Thread(target=window.acquire, args=(30, stop))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    window.release(60)
    waiting.join(5)
    assert window.used == 70
    window.release(70)
    assert window.acquire(1000, stop)  # alone, a large unit passes
    assert window.peak == 1000


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_a_failure_in_any_stage_stops_everything(stage: str) -> None:
    def fail_at_7(unit: Unit) -> None:
        if unit.number == 7:
            raise ValueError(f"{stage} failed")

    def read(unit: Unit) -> list[torch.Tensor]:
        if stage == "read":
            fail_at_7(unit)
        return [torch.zeros(10)]

    def compute(unit: Unit, loaded: list[torch.Tensor]) -> tuple[torch.Tensor, TensorStats]:
        if stage == "compute":
            fail_at_7(unit)
        return loaded[0], TensorStats()

    def write(unit: Unit, data: torch.Tensor, stats: TensorStats) -> None:
        if stage == "write":
            fail_at_7(unit)

    window = Window(25)
    pipeline = Pipeline(read, compute, write, lambda unit: 10, window, computers=3)
    before = threading.active_count()
    with pytest.raises(ValueError, match=f"{stage} failed"):
        pipeline.run([Unit(i, 0, 0, 1) for i in range(50)])
    assert threading.active_count() == before
    assert window.peak <= 25


def test_every_element_once() -> None:
    from merge_cli.checkpoint.header import TensorRef
    from merge_cli.engine.plan import TensorTask

    def task(size: int) -> TensorTask:
        ref = TensorRef("w", Path("x"), "F32", (size,), 0, 4 * size)
        return TensorTask("w", (size,), "F32", "merge", (ref,) * 3, (0, 1, 2), (0, 1, 2))

    for size in (0, 1, 65_536, 10_000_000, 123_456_789):
        cut = cut_units([task(size)])
        assert cut[0].start == 0
        assert cut[-1].stop == size
        assert all(a.stop == b.start for a, b in zip(cut, cut[1:], strict=False))
        assert all(unit.cost(task(size)) <= 2 * units.UNIT_BYTES for unit in cut)


def test_memory_is_planned(family: Family) -> None:
    plan = merge_cli.plan(family.recipe("ties"))
    assert estimated_peak(plan, 1_250_000_000, 2) < 500_000_000  # a small model needs little
    assert window_bytes(MINIMUM_MEMORY, 2, 4) > 1.25 * units.UNIT_BYTES
    with pytest.raises(UsageError, match="at least 500 MB"):
        window_bytes(100_000_000, 2, 4)


def test_threads_of_torch_are_left_as_they_were(family: Family, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge(family.recipe("soup", base=False), tmp_path / "out")
    assert torch.get_num_threads() == before


@pytest.mark.cuda
@pytest.mark.parametrize("case", RECIPES)
def test_cuda_agrees_within_one_unit_in_the_last_place(
    family: Family, tmp_path: Path, case: str
) -> None:
    recipe = write_recipe(family, case)
    cpu = merge(recipe, tmp_path / "cpu")
    cuda = merge(recipe, tmp_path / "cuda", device="cuda")
    for name, tensor in cpu.items():
        step = (cuda[name].view(torch.int16) - tensor.view(torch.int16)).abs()
        assert int(step.max()) <= 1
