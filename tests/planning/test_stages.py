"""Recipes of several documents: stages whose results later ones merge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import merge_cli
from merge_cli.cli import app
from merge_cli.engine import merge as engine
from merge_cli.engine.loop import run_loop
from merge_cli.errors import MismatchError, RecipeError, ResourceError, UsageError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe
from merge_cli.planning.stages import plan_recipe
from tests.support.hub_server import HubServer
from tests.support.tiny import Family, llama_family, merge

CPU = MergeOptions(device="cpu")

FIRST = """\
name: first
merge_method: linear
models: [a, b]
parameters: {weight: 0.5}
dtype: float32
"""
SECOND = """\
name: second
merge_method: slerp
base_model: first
models: [c]
parameters: {t: 0.25}
dtype: float32
"""
LAST = """\
merge_method: ties
base_model: base
models:
  - {model: second, parameters: {weight: 1.0, density: 0.5}}
  - {model: c, parameters: {weight: 0.5, density: 0.6}}
dtype: bfloat16
"""
OF_FIRST = LAST.replace("second", "first")


def three(family: Family) -> Path:
    return family.write("---\n".join([FIRST, SECOND, LAST]))


def model_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def step_by_step(family: Family, *documents: str) -> dict[str, bytes]:
    """The same by hand: each document run by itself, its result a folder beside the recipe."""
    for text in documents:
        name = text.partition("\n")[0].removeprefix("name: ") if text.startswith("name") else "end"
        merge(family.write(text), family.folder / name)
    return model_bytes(family.folder / "end")


def test_the_result_is_that_of_the_stages_run_one_after_the_other(family: Family) -> None:
    out = family.folder / "out"
    result = merge_cli.merge(three(family), out, options=CPU)
    assert not (family.folder / "out.stages").exists()
    assert [stage["name"] for stage in result.report["stages"]] == ["first", "second"]
    assert result.report["stages"][1]["method"] == "slerp"
    assert "second" in (out / "merge_report.html").read_text()
    assert model_bytes(out) == step_by_step(family, FIRST, SECOND, LAST)


def test_documents_may_stand_in_any_order(family: Family) -> None:
    expected = merge_cli.merge(three(family), family.folder / "out", options=CPU)
    recipe = family.write("---\n".join([LAST, SECOND, FIRST]))
    assert [stage.name for stage in load_recipe(recipe).stages] == ["first", "second"]
    result = merge_cli.merge(recipe, family.folder / "other", options=CPU)
    assert model_bytes(result.path) == model_bytes(expected.path)


def test_running_the_resolved_recipe_gives_the_same_bytes(family: Family) -> None:
    out = merge_cli.merge(three(family), family.folder / "deep" / "out", options=CPU).path
    recipe = out / "merge_recipe.yaml"
    loaded = load_recipe(recipe)
    assert [stage.name for stage in loaded.stages] == ["first", "second"]
    assert sorted(loaded.stages[0].inputs) == ["../../a", "../../b"]
    assert sorted(loaded.inputs) == ["../../base", "../../c"]  # a stage's result is made again
    again = merge_cli.merge(recipe, family.folder / "again", options=CPU).path
    assert model_bytes(again) == model_bytes(out)
    llama_family(family.folder / "others", seed=1)
    os.rename(family.folder / "others" / "a", family.folder / "a2")
    os.rename(family.folder / "a", family.folder / "a1")
    os.rename(family.folder / "a2", family.folder / "a")
    with pytest.raises(merge_cli.errors.SourceError, match="not the model that this recipe"):
        merge_cli.merge(recipe, family.folder / "more", options=CPU)


def test_the_card_shows_the_whole_recipe_and_no_paths(family: Family) -> None:
    out = merge_cli.merge(three(family), family.folder / "out", options=CPU).path
    card = (out / "README.md").read_text()
    assert card.count("merge_method: ") == 3
    assert "- model: second" in card
    assert "| `second` | merged | made by the recipe |" in card
    assert "| `a` | merged in first | a local folder |" in card
    assert str(family.folder) not in card


def test_a_stage_rounds_to_its_own_dtype(family: Family) -> None:
    """Without `dtype`, results are stored as the sources are: bfloat16 here."""
    text = "---\n".join(
        [
            "name: half\nmerge_method: linear\nmodels: [a, b]\n",
            "merge_method: passthrough\nmodels: [half]\ndtype: float32\n",
        ]
    )
    merged = merge(family.write(text), family.folder / "out")
    average = {
        name: ((family.models[0][name].float() + family.models[1][name].float()) / 2)
        .to(torch.bfloat16)
        .float()
        for name in family.base
    }
    assert all(torch.equal(merged[name], average[name]) for name in average)


def test_all_named_the_last_that_none_uses_is_the_result(family: Family) -> None:
    last = "name: third\n" + LAST
    recipe = family.write("---\n".join([last, FIRST, SECOND]))
    assert load_recipe(recipe).name == "third"


def test_an_unused_stage_is_a_result_of_its_own(family: Family) -> None:
    own = "name: own/model\nmerge_method: linear\nmodels: [b, c]\n"
    recipe = family.write("---\n".join([FIRST, SECOND, own, LAST]))
    out = family.folder / "out"
    merge_cli.merge(recipe, out, options=CPU)
    stages = family.folder / "out.stages"
    assert sorted(path.name for path in stages.iterdir() if path.is_dir()) == ["own--model"]
    assert (stages / "own--model" / "model.safetensors").exists()
    assert "own/model" not in (out / "merge_recipe.yaml").read_text()
    assert model_bytes(out) == step_by_step(family, FIRST, SECOND, LAST)


def test_keep_stages(family: Family) -> None:
    options = MergeOptions(device="cpu", keep_stages=True)
    merge_cli.merge(three(family), family.folder / "out", options=options)
    kept = family.folder / "out.stages"
    assert (kept / "first" / "merge_report.html").exists()
    assert (
        load_file(kept / "second" / "model.safetensors")["model.norm.weight"].dtype is torch.float32
    )


def test_finished_stages_are_not_made_again(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli import documents

    recipe, out = three(family), family.folder / "out"
    execute, made = engine.execute, []

    def failing(plan, target, options, **rest):  # type: ignore[no-untyped-def]
        made.append(target.name)
        if target.name == "out" and len(made) == 3:
            raise ResourceError("the disk is full")
        return execute(plan, target, options, **rest)

    monkeypatch.setattr(documents, "execute", failing)
    with pytest.raises(ResourceError):
        merge_cli.merge(recipe, out, options=CPU)
    assert made == ["first", "second", "out"]
    assert not out.exists()
    merge_cli.merge(recipe, out, options=CPU)
    assert made == ["first", "second", "out", "out"]
    assert model_bytes(out) == step_by_step(family, FIRST, SECOND, LAST)


def test_a_changed_stage_is_made_again_with_all_that_use_it(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli import documents

    options = MergeOptions(device="cpu", keep_stages=True)
    merge_cli.merge(three(family), family.folder / "out", options=options)
    execute, made = engine.execute, []
    monkeypatch.setattr(
        documents,
        "execute",
        lambda plan, target, *a, **k: made.append(target.name) or execute(plan, target, *a, **k),
    )
    other = MergeOptions(device="cpu", keep_stages=True, overwrite=True)
    changed = SECOND.replace("0.25", "0.75")
    merge_cli.merge(
        family.write("---\n".join([FIRST, changed, LAST])), family.folder / "out", options=other
    )
    assert made == ["second", "out"]
    assert model_bytes(family.folder / "out") == step_by_step(family, FIRST, changed, LAST)


def test_an_interrupted_stage_that_was_changed_begins_anew(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a merge that nobody wants any more is in the way."""
    from merge_cli import documents

    def stopped(plan, *rest):  # type: ignore[no-untyped-def]
        done = run_loop(plan, *rest)
        if plan.recipe.name == "second":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(documents, "run_loop", stopped)
    with pytest.raises(merge_cli.errors.Interrupted):
        merge_cli.merge(three(family), family.folder / "out", options=CPU)
    assert (family.folder / "out.stages" / "second.partial" / "journal.jsonl").exists()
    monkeypatch.setattr(documents, "run_loop", run_loop)
    execute, made = engine.execute, []

    def noted(plan, target, *rest, **named):  # type: ignore[no-untyped-def]
        made.append(target.name)
        return execute(plan, target, *rest, **named)

    monkeypatch.setattr(documents, "execute", noted)
    changed = SECOND.replace("0.25", "0.75")
    recipe = family.write("---\n".join([FIRST, changed, LAST]))
    merge_cli.merge(recipe, family.folder / "out", options=CPU)
    assert made == ["second", "out"]
    assert model_bytes(family.folder / "out") == step_by_step(family, FIRST, changed, LAST)


def test_killed_in_any_stage_the_same_command_goes_on(tmp_path: Path) -> None:
    """Killed at moments spread over the run, until a run comes to its end."""
    family = llama_family(tmp_path, layers=12)
    recipe, out = three(family), tmp_path / "out"
    command = [sys.executable, "-m", "merge_cli", "run", str(recipe), str(out), "--device", "cpu"]
    seen = set()
    for wait in range(40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        goal = ("first.partial", "first", "second.partial", "second", "")[min(wait, 4)]
        while process.poll() is None and time.monotonic() < deadline:
            if goal and (tmp_path / "out.stages" / goal).exists():
                process.send_signal(signal.SIGKILL)
                seen.add(goal)
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
    assert process.returncode == 0
    assert {"first", "second"} <= seen
    assert not (tmp_path / "out.stages").exists()
    assert model_bytes(out) == step_by_step(family, FIRST, SECOND, LAST)


def test_published_but_not_tidied(family: Family) -> None:
    """What a process leaves that was killed after OUT was there: the same command ends well."""
    recipe, out = three(family), family.folder / "out"
    first = merge_cli.merge(recipe, out, options=MergeOptions(device="cpu", keep_stages=True))
    before = (out / "merge_report.json").stat().st_mtime_ns
    again = merge_cli.merge(recipe, out, options=CPU)
    assert (out / "merge_report.json").stat().st_mtime_ns == before
    assert again.report["work"] == first.report["work"]
    assert not (family.folder / "out.stages").exists()
    with pytest.raises(UsageError, match="exists already"):
        merge_cli.merge(recipe, out, options=CPU)
    assert not (family.folder / "out.stages").exists()


def test_a_stage_that_was_published_and_not_noted(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_cli import documents

    options = MergeOptions(device="cpu", keep_stages=True)
    merge_cli.merge(three(family), family.folder / "out", options=options)
    (family.folder / "out.stages" / "second.done").unlink()
    execute, made = engine.execute, []

    def noted(plan, target, *rest, **named):  # type: ignore[no-untyped-def]
        made.append(target.name)
        return execute(plan, target, *rest, **named)

    monkeypatch.setattr(documents, "execute", noted)
    again = MergeOptions(device="cpu", overwrite=True)
    os.rename(family.folder / "out", family.folder / "elsewhere")
    merge_cli.merge(three(family), family.folder / "out", options=again)
    assert made == ["out"]


def test_somebody_elses_folder_is_left_alone(family: Family) -> None:
    (family.folder / "out.stages").mkdir()
    (family.folder / "out.stages" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not an unfinished merge of stages"):
        merge_cli.merge(three(family), family.folder / "out", options=CPU)
    assert (family.folder / "out.stages" / "letter.txt").read_text() == "mine"


def test_shards_of_stages(family: Family) -> None:
    recipe = three(family)
    whole = merge(recipe, family.folder / "whole")
    cut = merge(recipe, family.folder / "cut", shard_size=4000)
    assert len(list((family.folder / "cut").glob("*.safetensors"))) > 1
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_everything_is_planned_before_any_work(family: Family, tmp_path: Path) -> None:
    small = llama_family(tmp_path / "small", layers=2)
    wrong = LAST.replace("model: c", f"model: {small.folder / 'a'}")
    recipe = family.write("---\n".join([FIRST, SECOND, wrong]))
    with pytest.raises(MismatchError, match="do not fit"):
        merge_cli.merge(recipe, family.folder / "out", options=CPU)
    assert not (family.folder / "out.stages").exists()


def test_the_plan_and_the_merge_agree_on_the_work(family: Family) -> None:
    plan = plan_recipe(load_recipe(three(family)))
    assert [name for name in plan.stages] == ["first", "second"]
    result = merge_cli.merge(plan, family.folder / "out", options=CPU)
    from merge_cli.engine.journal import work_key

    assert result.report["work"] == work_key(plan, "cpu", True)


def test_stages_that_learn_and_search(tmp_path: Path) -> None:
    """DAM, then a greedy soup over what it made: both resolved in the result's recipe."""
    from tests.support.evolve_tiny import write_family

    folder = write_family(tmp_path)
    learned = {
        "name": "learned",
        "merge_method": "dam",
        "base_model": "base",
        "models": [{"model": m, "data": f"{m}.search.jsonl"} for m in ("a", "b")],
        "training": {"max_steps": 2},
    }
    searched = {
        "name": "searched",
        "merge_method": "greedy_soup",
        "models": ["learned", "a", "b"],
        "objective": [{"task": "loss", "data": "a.search.jsonl"}],
    }
    last = {"merge_method": "linear", "models": ["searched", "learned"]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump_all([learned, searched, last], sort_keys=False))
    out = merge_cli.merge(recipe, tmp_path / "out", options=CPU).path
    resolved = load_recipe(out / "merge_recipe.yaml")
    assert [one.merge_method for one in resolved.stages] == ["dam", "soup"]
    assert resolved.stages[0].coefficients == "./stages/learned/coefficients.safetensors"
    assert (folder / "out" / "stages" / "learned" / "coefficients.safetensors").is_file()
    again = merge_cli.merge(out / "merge_recipe.yaml", tmp_path / "again", options=CPU).path
    assert model_bytes(again) == model_bytes(out)


def test_the_command_line_shows_stages(family: Family) -> None:
    recipe = three(family)
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", str(recipe)])
    assert shown.exit_code == 0, shown.output
    assert "Stage 2: second" in shown.output
    assert "slerp of first, c" in shown.output
    data = json.loads(runner.invoke(app, ["plan", str(recipe), "--json"]).stdout)
    assert list(data["stages"]) == ["first", "second"]
    assert "stages" not in data["stages"]["second"]
    out = family.folder / "out"
    done = runner.invoke(app, ["run", str(recipe), str(out), "--device", "cpu", "--keep-stages"])
    assert done.exit_code == 0, done.output
    assert "stage   second: slerp of first, c" in done.stdout
    assert "stage 1 of 2: first" in done.stderr
    assert (family.folder / "out.stages" / "first").is_dir()


@pytest.mark.parametrize(
    ("documents", "line", "message"),
    [
        (["name: x\n" + LAST, FIRST.replace("[a", "[second"), SECOND], 9, "first -> second -> fi"),
        ([FIRST.replace("[a", "[first"), OF_FIRST], 1, "first -> first"),
        ([FIRST, SECOND.replace("first", "frist"), LAST], 9, "Did you mean 'first'?"),
        ([FIRST, LAST.replace("second", "first"), LAST], 14, "a second document without a name"),
        ([FIRST, FIRST, OF_FIRST], 7, "the name of another document, on line 1"),
        ([FIRST.replace("first", "my model"), OF_FIRST], 1, "cannot name a stage"),
        ([FIRST.replace("first", "lock"), OF_FIRST], 1, "cannot name a stage"),
        ([FIRST.replace("first", "base"), LAST.replace("second", "a")], 8, "and a folder, too"),
        ([FIRST, LAST.replace("second", "first@main")], 10, "no revisions"),
        ([FIRST, LAST.replace("second", "first+c")], 10, "no adapter"),
        ([FIRST, LAST.replace("second", "nothing")], 10, "no document of this file"),
        ([FIRST + "eval: [{task: loss, data: x.jsonl}]\n", OF_FIRST], 6, "only the result is"),
        ([FIRST, "[1, 2]\n"], 7, "a recipe is a mapping"),
        ([FIRST.replace("weight", "wieght"), OF_FIRST], 4, "Did you mean 'weight'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_where_it_stands(
    family: Family, documents: list[str], line: int, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        merge_cli.plan(family.write("---\n".join(documents)))
    found = [p for p in caught.value.problems if message in str(p)]
    assert found, str(caught.value)
    assert [p.line for p in found] == [line]


def test_problems_of_all_documents_are_told_at_once(family: Family) -> None:
    documents = [FIRST.replace("weight", "wieght"), SECOND.replace("t: 0.25", "tt: 7"), LAST]
    with pytest.raises(RecipeError) as caught:
        load_recipe(family.write("---\n".join(documents)))
    assert [p.line for p in caught.value.problems] == [4, 11]


def test_empty_documents_count_for_nothing(family: Family) -> None:
    recipe = family.write("---\n# a comment\n---\n" + FIRST + "---\n")
    assert load_recipe(recipe).stages == ()
    assert load_recipe(recipe).name == "first"


def test_other_commands_say_that_they_read_one_document(family: Family) -> None:
    with pytest.raises(UsageError, match="several documents"):
        merge_cli.analyze(three(family))


def test_fresh_makes_every_stage_again(family: Family) -> None:
    options = MergeOptions(device="cpu", keep_stages=True)
    merge_cli.merge(three(family), family.folder / "out", options=options)
    place = family.folder / "out.stages" / "first" / "merge_report.json"
    before = place.stat().st_mtime_ns
    fresh = MergeOptions(device="cpu", keep_stages=True, fresh=True, overwrite=True)
    merge_cli.merge(three(family), family.folder / "out", options=fresh)
    assert place.stat().st_mtime_ns > before


def test_vocabularies_meet_in_a_later_stage(tmp_path: Path) -> None:
    """The tokenizer of what is still to be made is known to the plan."""
    from tests.support.vocabularies import pair

    pair(tmp_path)
    union = {
        "name": "both",
        "merge_method": "linear",
        "models": ["base", "chat"],
        "tokenizer_source": "union",
    }
    last = {
        "merge_method": "linear",
        "models": ["both", "chat"],
        "tokenizer": {"source": "both", "tokens": {"<s>": {"source": "both", "force": True}}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump_all([union, last], sort_keys=False))
    out = merge_cli.merge(recipe, tmp_path / "out", options=CPU).path
    files = "model.safetensors", "tokenizer.json", "config.json"
    again = merge_cli.merge(out / "merge_recipe.yaml", tmp_path / "again", options=CPU).path
    assert all((again / name).read_bytes() == (out / name).read_bytes() for name in files)
    recipe.write_text(yaml.safe_dump(union | {"name": "x"}))
    merge_cli.merge(recipe, tmp_path / "both", options=CPU)
    recipe.write_text(yaml.safe_dump(last))
    alone = merge_cli.merge(recipe, tmp_path / "alone", options=CPU).path
    assert all((alone / name).read_bytes() == (out / name).read_bytes() for name in files)


def test_stages_of_models_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """The card links what stages merged, and the recipe pins it to its commit."""
    family = llama_family(tmp_path / "family")
    commit = {name: hub.add(f"org/{name}", family.folder / name) for name in ("base", "a")}
    first = "name: first\nmerge_method: linear\nmodels: [org/base, org/a]\n"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(first + "---\nmerge_method: passthrough\nmodels: [first]\n")
    out = merge_cli.merge(recipe, tmp_path / "out", options=CPU).path
    card = (out / "README.md").read_text()
    assert "| [org/a](https://huggingface.co/org/a) | merged in first | `" in card
    assert "- org/base\n- org/a\n" in card
    assert f"- model: org/a@{commit['a']}" in (out / "merge_recipe.yaml").read_text()
