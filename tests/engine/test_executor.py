"""The same bytes however it is run: threads, blocks, units, window, shards, interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import merge_cli
from merge_cli.engine import loop, memory, operands
from merge_cli.engine import pool as workers
from merge_cli.engine.device import choose_device
from merge_cli.engine.journal import Journal
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.errors import UsageError
from merge_cli.kernels import reduce, select, threshold_search
from merge_cli.planning import chunks as units
from merge_cli.planning.chunks import cut_chunks
from merge_cli.system.records import seal, unseal
from tests.support.merges import RECIPES, digest, interrupt, write_recipe
from tests.support.tiny import Family, llama_family, merge, write_model


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and blocks so small that even tiny tensors are cut into many."""
    for module in (units, reduce):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(memory, "_HOST_BLOCK", 64)
    monkeypatch.setattr(units, "UNIT_BYTES", 1024)
    # a sample that tells little, and few bins: thresholds take several passes
    monkeypatch.setattr(operands, "_SAMPLE_RUN", 16)
    monkeypatch.setattr(select, "_SMALLEST_SAMPLE", 64)
    monkeypatch.setattr(threshold_search, "_BINS", 2**8)


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
    monkeypatch.setattr(units, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    monkeypatch.setattr(operands, "_SAMPLE_RUN", 64)
    tasks = merge_cli.plan(recipe).tasks
    assert len(cut_chunks(tasks)) > 2 * len(tasks)
    for runs in (1, 3):
        monkeypatch.setattr(memory, "_HOST_BLOCK", 64 * runs)
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


@pytest.mark.parametrize("case", ["ties", "slerp", "dare", "soup"])
def test_a_small_tensor_is_read_once(family: Family, tmp_path: Path, case: str) -> None:
    """Whatever the method must know first: norms, thresholds, products."""
    result = merge_cli.merge(write_recipe(family, case), tmp_path / "out")
    plan = merge_cli.plan(write_recipe(family, case))
    assert result.report["cost"]["stages"]["read"]["bytes"] == plan.bytes_read


# Resuming


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("case", ["soup", "ties model", "dare", "slerp"])
def test_interrupted_and_resumed(family: Family, tmp_path: Path, case: str) -> None:
    recipe = write_recipe(family, case)
    merge(recipe, tmp_path / "whole")
    for stop in (1, 5, 20):
        interrupt(recipe, tmp_path / "out", stop)
        assert not (tmp_path / "out").exists()
    computed: list[tuple[int, TensorStats]] = []
    real = Journal.record

    def record(self: Journal, merged: Iterable[tuple[int, TensorStats]]) -> None:
        chunks = list(merged)
        computed.extend(chunks)
        real(self, chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "record", record)
        result = merge_cli.merge(recipe, tmp_path / "out")
    plan = merge_cli.plan(recipe)
    assert 0 < len(computed) < len(cut_chunks(plan.tasks)) - 15
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
    head = unseal(first.encode() + b"\n")
    assert head is not None
    changed = seal({**head, "boot": "another"}).decode()
    (tmp_path / "out.partial" / "journal.jsonl").write_text(changed + rest)
    lines_synced = int(re.findall(r'"synced":(\d+)', rest)[-1])
    path = tmp_path / "out.partial" / "journal.jsonl"
    opened = Journal(path, head["key"], head["inputs"])
    assert 0 < opened.count == lines_synced <= rest.count('"chunks"')
    assert len(opened.done) >= lines_synced
    opened.close()
    merge_cli.merge(recipe, tmp_path / "out", options=options)


def test_torn_journal_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "key")
    journal.record([(0, TensorStats(count=3))])
    journal.record([(1, TensorStats(count=4)), (2, TensorStats(count=7))])
    journal.close()
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path, "key")
    assert again.done.keys() == {0}
    again.record([(1, TensorStats(count=5)), (3, TensorStats(count=6))])
    again.close()
    last = Journal(path, "key")
    assert {number: stats.count for number, stats in last.done.items()} == {0: 3, 1: 5, 3: 6}
    last.close()


# The loop


def test_small_tensors_are_taken_many_at_a_time(family: Family) -> None:
    plan = merge_cli.plan(family.recipe("ties"))
    order = sorted(range(len(plan.tasks)), key=lambda task: -plan.tasks[task].bytes_read)
    sizes = [plan.tasks[task].bytes_read for task in order]
    for threads in (1, 3, 1000):
        batches = loop.task_batches(plan, order, threads)
        assert [task for batch in batches for task in batch] == order  # each once, in order
        limit = sum(sizes) // (threads * loop._TURNS)
        for batch in batches:
            taken = [plan.tasks[task].bytes_read for task in batch]
            assert len(taken) == 1 or sum(taken) <= limit
    assert len(loop.task_batches(plan, order, 1)) < len(order)
    assert len(loop.task_batches(plan, order, 1000)) == len(order)


def test_every_element_once() -> None:
    from merge_cli.checkpoint.headers import TensorRef
    from merge_cli.planning.plan import TensorTask

    def task(size: int) -> TensorTask:
        ref = TensorRef("w", Path("x"), "F32", (size,), 0, 4 * size)
        return TensorTask("w", (size,), "F32", "merge", (ref,) * 3, (0, 1, 2), (0, 1, 2))

    for size in (0, 1, 65_536, 10_000_000, 123_456_789):
        cut = cut_chunks([task(size)])
        assert cut[0].start == 0
        assert cut[-1].stop == size
        assert all(a.stop == b.start for a, b in zip(cut, cut[1:], strict=False))
        assert all(12 * (unit.stop - unit.start) <= units.UNIT_BYTES for unit in cut)


def test_memory_is_planned(family: Family) -> None:
    plan, cpu = merge_cli.plan(family.recipe("ties")), choose_device("cpu")
    peak = memory.estimated_peak(plan, cpu, merge_cli.MergeOptions())
    assert peak < 500_000_000  # a small model needs little
    many = memory.worker_memory(plan, cpu, merge_cli.MergeOptions(threads=1000))
    assert many.workers < 1000  # what does not fit is not begun
    few = merge_cli.MergeOptions(threads=1000, max_memory=200_000_000)
    assert 1 <= memory.worker_memory(plan, cpu, few).workers < many.workers
    assert memory.estimated_peak(plan, cpu, few) <= few.max_memory
    with pytest.raises(UsageError, match="too little") as refused:
        memory.worker_memory(plan, cpu, merge_cli.MergeOptions(max_memory=100_000_000))
    found = re.search(r"at least (\d+) MB", str(refused.value))
    assert found is not None
    least = 1_000_000 * int(found[1])
    assert least <= 200_000_000
    enough = merge_cli.MergeOptions(max_memory=least)  # what it asks for is enough, and no excess
    assert memory.estimated_peak(plan, cpu, enough) <= least
    with pytest.raises(UsageError, match="too little"):
        memory.worker_memory(plan, cpu, merge_cli.MergeOptions(max_memory=least - 10_000_000))


@pytest.mark.parametrize(
    ("method", "threads", "free", "expected"),
    [
        ("ties", 2, 10**9, (2, 262_144)),  # the usual block, which the cache was measured with
        ("ties", 16, 10**9, (16, 262_144)),  # a loop holds Python's lock once for a chunk
        ("ties", 64, 2 * 10**8, (15, 262_144)),
        ("ties", 2, 10**7, (2, 65_536)),
        ("ties", 2, 0, (1, 65_536)),  # the least; less is refused where the user asked for it
        ("breadcrumbs", 2, 10**9, (2, 262_144)),
        ("breadcrumbs", 16, 10**9, (16, 1_048_576)),  # many threads, and room for larger blocks
        ("breadcrumbs", 64, 10**9, (64, 262_144)),  # rather all threads than larger blocks
    ],
)
def test_blocks_follow_from_threads_and_memory(
    family: Family, method: str, threads: int, free: int, expected: tuple[int, int]
) -> None:
    plan = merge_cli.plan(family.recipe(method))
    inputs = max(len(task.inputs) for task in plan.tasks)
    room = memory._host_memory(plan, inputs, threads, free)
    assert (room.workers, room.block) == expected
    assert room.workers == 1 or room.workers * room.bytes <= free


def test_larger_blocks_write_the_same_bytes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_HOST_BLOCK", 256)
    monkeypatch.setattr(memory, "BLOCK_MULTIPLE", 64)
    recipe = family.recipe("breadcrumbs", parameters={"density": 0.53})
    digests = set()
    for threads in (1, memory._MANY_THREADS):
        merge(recipe, tmp_path / str(threads), threads=threads)
        digests.add(digest(tmp_path / str(threads)))
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", RECIPES)
def test_compiled_and_torch_write_the_same_bytes(
    family: Family, tmp_path: Path, case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = family.recipe(case.partition(" ")[0], **{**RECIPES[case], "dtype": dtype})
    merge(recipe, tmp_path / "compiled")
    monkeypatch.setattr(workers, "choose_arithmetic", lambda plan: ("torch", "a test"))
    merge(recipe, tmp_path / "torch")
    assert digest(tmp_path / "compiled") == digest(tmp_path / "torch")
    used = [
        json.loads((tmp_path / name / "merge_report.json").read_text())["device"]["arithmetic"]
        for name in ("compiled", "torch")
    ]
    assert used == ["compiled", "torch: a test"]


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
