"""`init`: what it proposes, that it plans and merges, what it refuses, the questions it asks."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from rich.console import Console

import merge_cli
from merge_cli.console.questions import Questions
from merge_cli.drafting import scaffold as drafting
from merge_cli.drafting.scaffold import scaffold, study_models
from merge_cli.errors import MismatchError, UsageError
from merge_cli.methods.method import Method
from merge_cli.methods.registry import all_methods
from tests.support.command import cli, failed
from tests.support.dam_tiny import config as dam_config
from tests.support.dam_tiny import write_data, write_models
from tests.support.hub_server import HubServer
from tests.support.tiny import Family, llama_config, llama_tensors, read_model, write_model

STATIC = [m for m in all_methods() if m.plain]


def flags(family: Family, *names: str, base: bool = True) -> list[str]:
    found = ["--base", str(family.folder / "base")] if base else []
    for name in names:
        found += ["--model", str(family.folder / name)]
    return found


def written(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("read", [True, False])
def test_what_is_written_can_be_planned_and_merged(
    family: Family, tmp_path: Path, read: bool
) -> None:
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "first.yaml"
    extra = [] if read else ["--headers-only"]
    done = cli("init", *flags(family, "a", "b", "c"), "--output", path, *extra)
    assert done.returncode == 0, done.stderr
    assert "task_arithmetic" in done.stdout
    assert f"merge-cli plan {path}" in done.stdout
    recipe = written(path)
    assert recipe["base_model"] == os.path.relpath(family.folder / "base", path.parent)
    assert recipe["dtype"] == "bfloat16"
    assert recipe["parameters"] == {"lambda": 0.3333}
    text = path.read_text()
    assert "# lambda 0.3333: 1/3" in text
    assert ("weights were not\n# read" in text) or ("weights were read" in text) is read
    assert cli("plan", path).returncode == 0
    assert cli("run", path, tmp_path / "out").returncode == 0


@pytest.mark.parametrize("method", STATIC, ids=lambda m: m.name)
def test_every_method(family: Family, tmp_path: Path, method: Method) -> None:
    """Every parameter of the method is there, and the recipe merges as it stands."""
    names = ["b"] if method.base_is_source else ["a", "b", "c"][: method.count[1] or 3]
    models = [str(family.folder / name) for name in names]
    based = method.needs_base or len(models) == 1  # two models to look at, at least
    base = str(family.folder / "base") if based else None
    found = study_models(base, models, read=False)
    made = scaffold(found, tmp_path / "r.yaml", method.name)
    assert made.method == method.name
    (tmp_path / "r.yaml").write_text(made.text)
    recipe = written(tmp_path / "r.yaml")
    own = recipe["models"][0].get("parameters", {})
    wanted = {n for n, p in method.parameters.items() if p.default is not None}
    found_there = set(recipe.get("parameters", {})) | set(own)
    assert wanted <= found_there <= set(method.parameters)
    assert all(f"# {name} " in made.text for name in found_there)
    merge_cli.merge(tmp_path / "r.yaml", tmp_path / "out")


def test_aliases_are_methods(family: Family, tmp_path: Path) -> None:
    done = cli("init", *flags(family, "a", "b"), "--method", "dare_linear", "-o", "-", "-q")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["merge_method"] == "dare_linear"
    assert "weight 0.5: 1/2, so that" in done.stdout


def test_without_a_base(family: Family, tmp_path: Path) -> None:
    for read in (True, False):
        found = study_models(None, [str(family.folder / n) for n in ("a", "b")], read=read)
        made = scaffold(found, tmp_path / "r.yaml")
        assert made.method == "soup"
        assert "--base" in made.text
        assert "slerp" in made.text


def test_nothing_is_overwritten(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("mine\n")
    arguments = ["init", *flags(family, "a", "b"), "-o", path]
    failed(cli(*arguments), 2, "--overwrite replaces it")
    assert path.read_text() == "mine\n"
    assert cli(*arguments, "--overwrite").returncode == 0
    assert written(path)["merge_method"] == "task_arithmetic"
    made = scaffold(study_models(None, [str(family.folder / n) for n in "ab"], read=False), path)
    with pytest.raises(UsageError, match="exists"):  # made meanwhile, by somebody else
        drafting.write_scaffold(made, path, overwrite=False)
    failed(cli("init", *flags(family, "a", "b"), "-o", tmp_path), 2, "is a folder")
    failed(cli("init", *flags(family, "a", "b"), "-o", tmp_path / "no" / "r.yaml"), 2, "no such")


def test_refusals(family: Family, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "r.yaml"]
    failed(cli("init", *out), 2, "--model is missing")
    failed(cli("init", *out, *flags(family, "a", "b"), "--method", "tie"), 2, "Did you mean 'ties'")
    failed(cli("init", *out, *flags(family, "a", "b"), "--method", "dam"), 2, "needs data of every")
    no_base = flags(family, "a", "b", base=False)
    failed(cli("init", *out, *no_base, "--method", "ties"), 2, "ties needs a base model")
    failed(cli("init", *out, *flags(family, "a", "b"), "--method", "nearswap"), 2, "merges 1 model")
    failed(cli("init", *out, *flags(family, "a", "none")), 3, "none")
    failed(cli("init", *out, "--model", family.folder / "a"), 2, "one model")
    assert not (tmp_path / "r.yaml").exists()


def test_models_that_do_not_fit(family: Family, tmp_path: Path) -> None:
    wide = llama_tensors(torch.Generator(), width=32)
    write_model(family.folder / "wide", wide, llama_config(width=32))
    done = cli("init", *flags(family, "a", "wide"), "-o", tmp_path / "r.yaml")
    failed(done, 3, "cannot be merged with one another")
    assert "model.embed_tokens.weight" in done.stderr
    assert not (tmp_path / "r.yaml").exists()


def test_other_vocabularies_are_brought_together(family: Family, tmp_path: Path) -> None:
    """Token 0 of b is token 2 of the others; c has another token in place of one."""
    words = [f"w{i}" for i in range(48)]
    others = {"b": [words[2], words[1], words[0], *words[3:]], "c": [*words[:-1], "own"]}
    for name in ("base", "a", "b", "c"):
        vocabulary = {word: i for i, word in enumerate(others.get(name, words))}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w1"}
        text = json.dumps({"version": "1.0", "model": model})
        (family.folder / name / "tokenizer.json").write_text(text)
    base = str(family.folder / "base")
    found = study_models(base, [str(family.folder / n) for n in "abc"])
    assert sum("another vocabulary" in note for note in found.notes) == 2
    for method in (None, "ties"):
        made = scaffold(found, tmp_path / "r.yaml", method)
        recipe = yaml.safe_load(made.text)
        assert recipe["tokenizer"]["source"] == "union"
        assert "# tokenizer source union: the vocabularies differ" in made.text
        assert len(recipe["models"]) == 3
    (tmp_path / "r.yaml").write_text(made.text)
    merged = read_model(merge_cli.merge(tmp_path / "r.yaml", tmp_path / "out").path)
    assert len(merged["model.embed_tokens.weight"]) == 49
    same = study_models(base, [str(family.folder / "a")])
    assert "tokenizer" not in yaml.safe_load(scaffold(same, tmp_path / "r.yaml").text)
    (family.folder / "a" / "tokenizer.json").unlink()  # says nothing of its tokens
    silent = study_models(base, [str(family.folder / "a")], read=False)
    assert "tokenizer" not in yaml.safe_load(scaffold(silent, tmp_path / "r.yaml").text)


def test_the_same_model_twice(family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.folder / "a", family.folder / "copy")
    found = study_models(None, [str(family.folder / "a"), str(family.folder / "copy")])
    with pytest.raises(MismatchError, match="Nothing is left to merge"):
        scaffold(found, tmp_path / "r.yaml")
    assert scaffold(found, tmp_path / "r.yaml", "soup").method == "soup"  # who insists


def test_large_models_are_not_read(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "READ_AT_MOST", 1000)
    base = str(family.folder / "base")
    found = study_models(base, [str(family.folder / n) for n in "ab"])
    assert any("merge-cli analyze says more" in note for note in found.notes)


def test_several_dtypes(family: Family, tmp_path: Path) -> None:
    folder = family.folder
    write_model(folder / "full", llama_tensors(torch.Generator()), llama_config())  # float32
    made = scaffold(
        study_models(str(folder / "base"), [str(folder / "full")], read=False), tmp_path / "r"
    )
    assert "dtype" not in yaml.safe_load(made.text)
    assert "several dtypes" in made.text


def test_hub_models_are_pinned_and_their_cards_read(
    hub: HubServer, family: Family, tmp_path: Path
) -> None:
    commits = {}
    for name in ("base", "a", "b"):
        files = {p.name: p.read_bytes() for p in (family.folder / name).iterdir()}
        if name != "base":
            files["README.md"] = b"---\nbase_model: org/base\n---\n"
        commits[name] = hub.add(f"org/{name}", files)
    found = study_models(None, ["org/a", "org/b"])
    assert "by their cards they were made from org/base: give it as the base" in found.notes
    assert hub.sent("model.safetensors") < 100_000  # headers alone
    found = study_models("org/base", ["org/a", "hf://org/b"])
    assert not any("cards" in note for note in found.notes)
    made = scaffold(found, tmp_path / "r.yaml")
    recipe = yaml.safe_load(made.text)
    assert recipe["base_model"] == f"org/base@{commits['base']}"
    assert recipe["models"][1]["model"] == f"hf://org/b@{commits['b']}"
    swapped = study_models(None, ["org/base", "org/a", "org/b"])
    assert any("from org/base: give it as the base" in note for note in swapped.notes)
    wrong = study_models(str(family.folder / "c"), ["org/a", "org/b"])
    assert any("were made from org/base, not from" in n for n in wrong.notes)


class Typed(io.StringIO):
    """Lines as a keyboard gives them: without their ends."""

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        assert self.tell() < len(self.getvalue()), "one question too many"
        return super().readline(-1).rstrip("\n")


def asked(answers: str, refused: tuple[str, ...] = ()) -> tuple[Questions, io.StringIO]:
    said = io.StringIO()

    def check(name: str) -> None:
        if name in refused:
            raise UsageError(f"no such model {name}")

    return Questions(Console(file=said, width=200), check, Typed(answers)), said


def with_data(family: Family, folder: Path, rows: int) -> list[Path]:
    """Families of the tests have no tokenizer; this one can be measured."""
    write_models(folder, dam_config(), names=("base", "a", "b"))
    write_data(folder, ("a", "b"), rows=rows)
    return [folder / "a.jsonl", folder / "b.jsonl"]


def study_flags(folder: Path) -> list[str]:
    return ["--base", f"{folder}/base", "--model", f"{folder}/a", "--model", f"{folder}/b"]


def test_data_beside_the_models_choose(family: Family, tmp_path: Path) -> None:
    with_data(family, tmp_path, 100)
    path = tmp_path / "r.yaml"
    done = cli("init", *study_flags(tmp_path), "-o", path)
    assert done.returncode == 0, done.stderr
    recipe = written(path)
    assert recipe["merge_method"] == "auto"
    assert recipe["models"] == [
        {"model": f"./{name}", "data": {"files": [f"{name}.jsonl"]}} for name in ("a", "b")
    ]
    assert recipe["budget"] == {"minutes": 10}
    plan = cli("plan", path)
    assert plan.returncode == 0, plan.stderr
    assert "regmean" in plan.stdout
    first, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=merge-cli.schema.json"
    schema = json.loads((tmp_path / "merge-cli.schema.json").read_text())
    jsonschema.validate(recipe, schema)


def test_data_are_given_or_too_few(family: Family, tmp_path: Path) -> None:
    a, b = with_data(family, tmp_path, 100)
    (tmp_path / "data").mkdir()
    moved = [path.rename(tmp_path / "data" / f"text-{path.name}") for path in (a, b)]
    flags_of = study_flags(tmp_path)
    path = tmp_path / "r.yaml"
    assert cli("init", *flags_of, "-o", path, "--no-schema").returncode == 0
    assert written(path)["merge_method"] != "auto"
    assert not (tmp_path / "merge-cli.schema.json").exists()
    given = [word for file in moved for word in ("--data", str(file))]
    for method in ("auto", "fisher", "regmean", "dam"):
        out = ["-o", path, "--overwrite", "--method", method]
        done = cli("init", *flags_of, *given, *out)
        assert done.returncode == 0, done.stderr
        assert written(path)["merge_method"] == method
        assert written(path)["models"][1]["data"] == {"files": ["data/text-b.jsonl"]}
    failed(cli("init", *flags_of, *given[:2], "-o", path, "--overwrite"), 2, "1 of --data for 2")
    missing = ["--data", "none.jsonl", "--data", "none.jsonl"]
    failed(cli("init", *flags_of, *missing, "-o", path, "--overwrite"), 2, "no such file")
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(moved[0].read_text().splitlines()[:5]) + "\n")
    done = cli("init", *flags_of, "--data", few, *given[2:], "-o", path, "--overwrite")
    assert done.returncode == 0
    assert "auto is not proposed" in done.stderr
    assert "too few different rows" in done.stderr
    assert written(path)["merge_method"] != "auto"


def test_a_model_that_is_named_twice(family: Family, tmp_path: Path) -> None:
    """It is drafted once. Its data are those beside it; two files of it would be one too many."""
    a, b = with_data(family, tmp_path, 100)
    flags_of, path = study_flags(tmp_path), tmp_path / "r.yaml"
    twice = ["--model", f"{tmp_path}/a"]
    for more in ([], ["--headers-only"]):
        done = cli("init", *flags_of, *twice, *more, "-o", path, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert [model["data"]["files"] for model in written(path)["models"]] == [
            ["a.jsonl"], ["b.jsonl"]
        ]  # fmt: skip
    out = ["-o", path, "--overwrite"]
    given = [word for file in (a, b, a) for word in ("--data", str(file))]
    failed(cli("init", *flags_of, *twice, *given, *out), 2, "is named twice")
    base = ["--model", f"{tmp_path}/base"]
    failed(cli("init", *flags_of, *base, *given, *out), 2, "or is the base")
    slerp = cli("init", *flags_of, "--method", "slerp", "-o", path, "--overwrite")
    failed(slerp, 2, "the base included", "Leave --base out")


def test_data_do_not_choose_between_a_model_and_its_copy(family: Family, tmp_path: Path) -> None:
    with_data(family, tmp_path, 100)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "copy.jsonl")
    path = tmp_path / "r.yaml"
    done = cli("init", *study_flags(tmp_path), "--model", f"{tmp_path}/copy", "-o", path)
    assert done.returncode == 0, done.stderr
    assert written(path)["merge_method"] == "auto"
    assert [model["model"] for model in written(path)["models"]] == ["./a", "./b"]


def test_yes_is_no_file_name() -> None:
    ask, said = asked("y\nmine.yaml\n")
    assert ask.path(Path("recipe.yaml")) == Path("mine.yaml")
    assert "Press Enter for recipe.yaml" in said.getvalue()


def test_questions_are_asked_until_they_are_answered() -> None:
    ask, said = asked("bad\nbase\n", refused=("bad",))
    assert ask.base() == "base"
    assert "no such model bad" in said.getvalue()
    ask, said = asked("\na\na\nbase\nb\n\n")
    assert ask.models("base") == ["a", "b"]
    assert said.getvalue().count("is in the list already") == 2
    ask, _ = asked("\n")
    assert ask.base() is None
    ask, _ = asked("a\n\nb\n\n")
    assert ask.models(None) == ["a", "b"]  # one is not enough without a base
    ask, said = asked("tie\nties\n")
    assert ask.method("soup", ["soup", "ties"]) == "ties"
    ask, _ = asked("\n\nn\n")
    assert ask.method("soup", ["soup", "ties"]) == "soup"
    assert ask.path(Path("recipe.yaml")) == Path("recipe.yaml")
    assert not ask.confirm("Write this?")


def on_terminal(folder: Path, answers: str, *arguments: str) -> tuple[int, str]:
    """Run `init` on a terminal of its own and type the answers."""
    master, slave = pty.openpty()
    os.write(master, answers.encode())
    done = cli("init", *arguments, cwd=folder, stdin=slave)
    os.close(slave)
    os.close(master)
    return done.returncode, done.stdout + done.stderr


def test_on_a_terminal(family: Family) -> None:
    folder = family.folder
    code, out = on_terminal(folder, "base\nnone/here\na\nb\n\nbreadcrumb\nties\n\ny\n")
    assert code == 0, out
    assert written(folder / "recipe.yaml")["merge_method"] == "ties"
    code, out = on_terminal(folder, "base\na\nb\n\n\nother.yaml\nn\n\x04\x04")
    assert code == 130, out  # the end of input, instead of another choice
    assert not (folder / "other.yaml").exists()
    code, out = on_terminal(folder, "", "--yes", "--output", "yet.yaml")
    assert code == 2
    assert "--model is missing" in out
