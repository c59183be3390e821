"""The life of OUT: every moment that a process can be killed at, and everyone else who is there."""

from __future__ import annotations

import inspect
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_cli
from merge_cli.checkpoint.layout import lay_out
from merge_cli.engine import output
from merge_cli.engine.merge import check_target
from merge_cli.engine.output import OutputWorkspace, open_journal
from merge_cli.errors import Interrupted, ResourceError, UsageError
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning import chunks as units
from merge_cli.system import raw_io, workspace
from merge_cli.system.raw_io import unfinished_file
from merge_cli.system.records import Records
from merge_cli.system.workspace import Workspace, is_at, lock_file
from tests.support.command import cli, failed
from tests.support.merges import digest, interrupt, write_recipe
from tests.support.tiny import Family, llama_config, merge, read_model, write_model

pytestmark = pytest.mark.usefixtures("small_units")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1024)
    monkeypatch.setattr(units, "BLOCK_MULTIPLE", 64)


def test_a_header_that_never_reached_its_file(family: Family, tmp_path: Path) -> None:
    """Killed between setting a shard's size and writing its header."""
    recipe = write_recipe(family, "soup")
    interrupt(recipe, tmp_path / "out")
    shard = tmp_path / "out.partial" / "model" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[:100] = bytes(100)
    shard.write_bytes(data)
    merged = merge(recipe, tmp_path / "out")
    expected = merge(recipe, tmp_path / "expected")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_other_work_of_the_same_size_leaves_nothing(family: Family, tmp_path: Path) -> None:
    """bfloat16 interrupted, float16 wanted: the files are as long, the headers are not the same."""
    interrupt(family.recipe("soup", base=False, dtype="bfloat16"), tmp_path / "out")
    recipe = family.recipe("soup", base=False, dtype="float16")
    with pytest.raises(UsageError, match="another recipe"):
        merge(recipe, tmp_path / "out")
    merged = merge(recipe, tmp_path / "out", fresh=True)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}


def test_other_work_in_other_files_leaves_nothing(family: Family, tmp_path: Path) -> None:
    interrupt(family.recipe("ties"), tmp_path / "out")
    merge(family.recipe("soup", base=False), tmp_path / "out", shard_size=3000, fresh=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert len(list((tmp_path / "out").glob("model-*"))) > 2


def test_other_code_is_other_work(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    recipe = write_recipe(family, "soup")
    interrupt(recipe, tmp_path / "out")
    monkeypatch.setattr(inspect, "getsource", lambda module: "another formula")
    with pytest.raises(UsageError, match="another version"):
        merge(recipe, tmp_path / "out")


def test_statistics_are_of_the_whole_or_none(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(family, "ties")
    interrupt(recipe, tmp_path / "out", statistics=False)
    with pytest.raises(UsageError, match="--fresh"):
        merge(recipe, tmp_path / "out")
    merge(recipe, tmp_path / "out", statistics=False)
    assert "sampled" not in (tmp_path / "out" / "merge_report.json").read_text()


def test_two_processes(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_PATIENCE", 0.1)
    with OutputWorkspace(tmp_path / "out") as work:
        for fresh in (False, True):
            with pytest.raises(ResourceError, match="another merge is writing here"):
                merge(write_recipe(family, "soup"), tmp_path / "out", fresh=fresh)
        assert work.target == tmp_path / "out"
    assert not (tmp_path / "out.partial.lock").exists()
    merge(write_recipe(family, "soup"), tmp_path / "out")


def test_a_lock_that_cannot_be_removed(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is published: that is a note, and no error."""
    real, said = Path.unlink, list[str]()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith(".lock"):
            raise OSError(116, "Stale file handle")
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(workspace, "say_once", said.append)
    merge(write_recipe(family, "soup"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert said == [f"{tmp_path}/out.partial.lock cannot be removed (Stale file handle); "
                    "it does no harm"]  # fmt: skip


def killed_between_renames(family: Family, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SIGKILL would leave it: the old model aside, the new one not yet in its place."""
    rename = os.rename

    def once(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == "replaced":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", once)
        with pytest.raises(Interrupted):
            merge(write_recipe(family, "soup"), out, overwrite=True)
    assert not out.exists()


@pytest.mark.parametrize("options", [{"overwrite": True}, {"overwrite": True, "fresh": True}])
def test_killed_between_the_two_renames(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    out = tmp_path / "out"
    merge(write_recipe(family, "ties"), out)
    killed_between_renames(family, out, monkeypatch)
    merge(write_recipe(family, "soup"), out, **options)
    merge(write_recipe(family, "soup"), tmp_path / "expected")
    assert digest(out) == digest(tmp_path / "expected")
    assert not (tmp_path / "out.partial").exists()


def test_a_replaced_model_survives_until_there_is_a_new_one(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    merge(write_recipe(family, "ties"), out)
    before = digest(out)
    killed_between_renames(family, out, monkeypatch)
    interrupt(write_recipe(family, "slerp"), out, overwrite=True, fresh=True)
    assert digest(out) == before


def test_killed_after_publishing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete, but not tidied up: the same command finds its result, another one is refused."""
    recipe, out = write_recipe(family, "soup"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(OutputWorkspace, "discard", lambda self: None)
        merge(recipe, out)
    leftovers = tmp_path / "out.partial"
    assert leftovers.exists()
    shutil.copytree(leftovers, tmp_path / "kept")
    with pytest.raises(UsageError, match="exists already"):
        merge(write_recipe(family, "ties"), out)
    shutil.rmtree(leftovers, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", leftovers)
    report = merge_cli.merge(write_recipe(family, "soup"), out).report
    assert report["recipe"]["method"] == "soup"
    assert not leftovers.exists()


@pytest.mark.parametrize("where", [".", "a", "base", ".."])
def test_overwrite_never_takes_what_the_merge_needs(family: Family, where: str) -> None:
    """OUT is a source, the folder of the sources, or above."""
    recipe = write_recipe(family, "ties")
    before = sorted(family.folder.rglob("*"))
    with pytest.raises(UsageError, match="would replace"):
        merge(recipe, family.folder / where, overwrite=True)
    assert sorted(p for p in family.folder.rglob("*") if ".partial" not in p.name) == before


def test_overwrite_replaces_models_only(family: Family, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(UsageError, match="is not a model"):
        merge(write_recipe(family, "soup"), tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


def test_a_link_as_output(family: Family, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    merge(write_recipe(family, "soup"), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").exists()


def test_a_journal_that_cannot_grow(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are allocated beforehand, so that a full disk shows in the journal first."""

    write = os.write
    calls = 0

    def full(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    recipe = write_recipe(family, "soup")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ResourceError, match="the disk is full"):
            merge(recipe, tmp_path / "out")
    assert merge_cli.merge(recipe, tmp_path / "out").report["cost"]["resumed_bytes"] > 0


def test_fsync_reaches_files_and_folders(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = raw_io.sync
    monkeypatch.setattr(output, "sync", lambda paths: real(synced.extend(p := list(paths)) or p))
    merge(write_recipe(family, "soup"), tmp_path / "out", fsync=True)
    names = {path.name for path in synced}
    assert {"model.safetensors", "config.json", "model", tmp_path.name} <= names


def test_contradicting_flags(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(family, "soup")
    failed(cli("run", recipe, tmp_path / "out", "--cuda", "--device", "cpu"), 2, "contradict")


def test_layouts_are_compared_exactly(tmp_path: Path) -> None:
    from merge_cli.checkpoint.layout import OutputTensor

    shards = tuple(lay_out([OutputTensor("w", "F32", (8, 4))], 10**9))
    other = tuple(lay_out([OutputTensor("w", "F32", (4, 8))], 10**9))
    assert shards[0].size == other[0].size
    with OutputWorkspace(tmp_path / "out") as work:
        open_journal(work, "key", shards).close()
        open_journal(work, "key", other).close()
        assert (work.model / "model.safetensors").read_bytes().startswith(other[0].header)


def test_half_discarded_work_is_not_a_result(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old model at OUT, a journal of other work without its model: nothing was published."""
    out = tmp_path / "out"
    merge(write_recipe(family, "ties"), out)
    interrupt(write_recipe(family, "soup"), out, overwrite=True)
    shutil.rmtree(tmp_path / "out.partial" / "model")
    report = merge_cli.merge(
        write_recipe(family, "soup"), out, options=merge_cli.MergeOptions(overwrite=True)
    ).report
    assert report["recipe"]["method"] == "soup"
    merge(write_recipe(family, "soup"), tmp_path / "expected")
    assert digest(out) == digest(tmp_path / "expected")


def test_a_folder_of_someone_elses_beside_out(family: Family, tmp_path: Path) -> None:
    """A source called OUT.partial, or any folder that no merge has made, is left alone."""
    shutil.copytree(family.folder / "a", family.folder / "m.partial")
    recipe = family.write("merge_method: soup\nmodels: [m.partial, b]\n")
    with pytest.raises(UsageError, match="is not an unfinished merge"):
        merge(recipe, family.folder / "m", fresh=True)
    assert (family.folder / "m.partial" / "model.safetensors").exists()


def test_non_finite_work_is_not_continued_without_leave(family: Family, tmp_path: Path) -> None:
    from merge_cli.errors import NonFiniteError

    tensors = {n: torch.full_like(t, float("nan")) for n, t in family.models[0].items()}
    write_model(family.folder / "a", tensors, llama_config())
    recipe = write_recipe(family, "soup")
    interrupt(recipe, tmp_path / "out", allow_non_finite=True)
    with pytest.raises(NonFiniteError, match="allowed then"):
        merge(recipe, tmp_path / "out")
    merge(recipe, tmp_path / "out", allow_non_finite=True)


def test_flags_of_an_earlier_run_leave_no_files(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (family.folder / "a" / "modeling_x.py").write_text("code")
    (family.folder / "a" / "tokenizer.json").write_text("{}")
    recipe = write_recipe(family, "soup")
    with monkeypatch.context() as patch:
        patch.setattr(OutputWorkspace, "publish", lambda self, *, fsync: (_ for _ in ()).throw(
            KeyboardInterrupt))  # fmt: skip
        with pytest.raises(Interrupted):
            merge(recipe, tmp_path / "out", trust_remote_code=True)
    merge(recipe, tmp_path / "out", copy_tokenizer=False)
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_two_interruptions_after_a_reboot(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done after a restart of the machine counts like what is done before any."""
    from merge_cli.system import records

    recipe = write_recipe(family, "soup")
    interrupt(recipe, tmp_path / "out")
    monkeypatch.setattr(records, "boot_id", lambda: "the next boot")
    interrupt(recipe, tmp_path / "out", lines_written=12)
    assert merge_cli.merge(recipe, tmp_path / "out").report["cost"]["resumed_bytes"] > 0


@pytest.mark.parametrize("out", ["/", "x" * 300])
def test_impossible_names(family: Family, tmp_path: Path, out: str) -> None:
    target = out if out == "/" else str(tmp_path / out)
    recipe = write_recipe(family, "soup")
    for flags in ([], ["--dry-run"]):
        done = cli("run", recipe, target, *flags)
        assert done.returncode in (2, 4), done.stderr
        assert "Traceback" not in done.stderr


def test_the_command_line_finds_what_was_published(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = family.recipe("soup", base=False), tmp_path / "out"
    monkeypatch.undo()  # units as the command line cuts them
    with monkeypatch.context() as patch:
        patch.setattr(OutputWorkspace, "discard", lambda self: None)
        merge(recipe, out, device="auto")
    done = cli("run", recipe, out)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out.partial").exists()


def test_a_method_defined_at_a_prompt(family: Family, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import merge_cli\n@merge_cli.merge_method('first')\ndef first(models):\n"
        "    'Take the first.'\n    return models[0]\n"
        f"merge_cli.merge({str(family.recipe('first', base=False))!r}, {str(tmp_path / 'out')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    merged = read_model(tmp_path / "out")
    assert all(torch.equal(t, family.models[0][name]) for name, t in merged.items())


def test_any_flipped_bit_of_a_journal(family: Family, tmp_path: Path) -> None:
    """What does not hold is merged again: the bytes are right, whichever bit it was."""
    recipe = write_recipe(family, "soup")
    merge(recipe, tmp_path / "expected")
    interrupt(recipe, tmp_path / "out", lines_written=6)
    partial = tmp_path / "out.partial"
    shutil.copytree(partial, tmp_path / "kept")
    whole = (partial / "journal.jsonl").read_bytes()
    for place in random.Random(0).sample(range(8 * len(whole)), 12):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", partial)
        (partial / "journal.jsonl").write_bytes(changed)
        merge(recipe, tmp_path / "out")
        assert digest(tmp_path / "out") == digest(tmp_path / "expected")
        shutil.rmtree(tmp_path / "out")


def test_a_folder_with_our_names_and_not_our_mark(family: Family, tmp_path: Path) -> None:
    """`model` is a word that others use, too."""
    mine = tmp_path / "out.partial" / "model"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="is not an unfinished merge"):
            merge(write_recipe(family, "soup"), tmp_path / "out", fresh=fresh, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "mine"


def test_home_is_never_replaced(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="would replace"):
        merge(write_recipe(family, "soup"), tmp_path / "home", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_out_meanwhile_stays(
    family: Family, tmp_path: Path, overwrite: bool
) -> None:
    """OUT was free when the merge began; somebody has put their work there since."""
    out = tmp_path / "out"

    def make(progress: Progress) -> None:
        out.mkdir(exist_ok=True)
        (out / "diary.txt").write_text("dear diary")

    recipe = write_recipe(family, "soup")
    with pytest.raises(UsageError, match=r"exists already|is not a model"):
        merge_cli.merge(recipe, out, on_progress=make, options=MergeOptions(overwrite=overwrite))
    assert (out / "diary.txt").read_text() == "dear diary"
    shutil.rmtree(out)
    merge(recipe, out)  # the work was kept
    assert (out / "model.safetensors").is_file()


def test_a_mount_point_is_refused_before_anything_is_read(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of a container: nothing can be renamed to it."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    plan = merge_cli.plan(write_recipe(family, "soup"))
    for refused in (
        lambda: merge_cli.merge(plan, out),
        lambda: check_target(plan, out, MergeOptions()),
    ):
        with pytest.raises(UsageError, match="mount point") as raised:
            refused()
        assert str(out / "merged") in raised.value.hint
    assert list(tmp_path.glob("out.*")) == []
    merge_cli.merge(plan, out / "merged")


@pytest.mark.parametrize("name", ["notes.txt", "train.jsonl", "plot.png", "run.sh", "data.csv"])
def test_overwrite_takes_no_file_that_models_do_not_have(
    family: Family, tmp_path: Path, name: str
) -> None:
    out, recipe = tmp_path / "out", write_recipe(family, "soup")
    merge(recipe, out)
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds {name}, which is no part of a model"):
        merge(recipe, out, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_overwrite_takes_what_models_have(family: Family, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", write_recipe(family, "soup")
    merge(recipe, out)
    for name in (
        "LICENSE", "License.txt", "USE_POLICY.md", ".gitattributes", "merges.txt", "vocab.txt",
        "modeling_own.py", "training_args.bin", "trainer_state.json", "consolidated.00.pth",
        "model-Q4.gguf", "tokenizer.model", "best_recipe.yaml", "search_journal.jsonl",
        "coefficients.safetensors", "merge_evaluation.json", "chat_template.jinja",
    ):  # fmt: skip
        (out / name).write_text("x")
    (out / "elsewhere.csv").symlink_to(family.folder / "recipe.yaml")
    merge(recipe, out, overwrite=True)
    assert not (out / "LICENSE").exists()
    assert (family.folder / "recipe.yaml").is_file()


def test_what_somebody_else_has_left_is_told(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT.partial of another user: nothing in it can be removed."""
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    (tmp_path / "out.partial" / "merge-cli").write_text("")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(ResourceError, match="what earlier work has left cannot be removed"):
        merge(write_recipe(family, "soup"), tmp_path / "out")


def test_a_lock_that_cannot_be_opened_is_named(family: Family, tmp_path: Path) -> None:
    (tmp_path / "out.partial.lock").mkdir()
    with pytest.raises(ResourceError) as raised:
        merge(write_recipe(family, "soup"), tmp_path / "out")
    assert raised.value.where == str(tmp_path / "out.partial.lock")


def test_a_lock_is_of_the_file_that_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "work.lock"
    first = lock_file(path)
    assert first is not None
    assert is_at(path, first)
    assert lock_file(path) is None
    path.unlink()  # as its owner does at the end
    assert not is_at(path, first)
    second = lock_file(path)
    assert second is not None
    assert is_at(path, second)
    os.close(first)
    os.close(second)


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with unfinished_file(path) as new:
        new.write_text("one")
    assert path.read_text() == "one"

    def fail() -> None:
        with unfinished_file(path) as new:
            new.write_text("two")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail()
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("file", "one")]


def test_work_is_resumed_by_its_own_key_alone(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", ".training", "training") as work:
        work.resume_work("key")
        work.write_record("done.json", "key", {"answer": 1})
        assert work.read_record("done.json", "key") == {"answer": 1}
        assert work.read_record("done.json", "another") is None
        Records(work.journal, "key").close()
    with Workspace(tmp_path / "out", ".training", "training") as work:
        with pytest.raises(UsageError, match="interrupted training of another recipe"):
            work.resume_work("another")
        work.resume_work("another", fresh=True)
        assert work.read_record("done.json", "key") is None
