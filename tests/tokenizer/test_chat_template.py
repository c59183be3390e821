"""Chat templates of a merge: no broken one is taken, and none is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

import merge_cli
from merge_cli.errors import SourceError
from merge_cli.options import MergeOptions
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.tokenizer import BUILT_IN
from tests.support.command import cli, failed
from tests.support.vocabularies import TEXTS, bpe, write

OPTIONS = MergeOptions(device="cpu", threads=1)
BROKEN = "{{ x"


def family_of_four(folder: Path, **templates: Any) -> dict[str, Any]:
    """A recipe of base, a, b and c, of which some have chat templates."""
    tokenizer = bpe(TEXTS, 60)
    for seed, name in enumerate(("base", "a", "b", "c")):
        write(folder / name, tokenizer, seed, chat=None)
        if templates.get(name) is not None:
            settings = folder / name / "tokenizer_config.json"
            about = json.loads(settings.read_text()) | {"chat_template": templates[name]}
            settings.write_text(json.dumps(about))
    return {"merge_method": "linear", "base_model": "base",
            "models": [{"model": name} for name in ("a", "b", "c")]}  # fmt: skip


def merge(folder: Path, recipe: dict[str, Any]) -> Plan:
    """Merge into OUT; the plan of it."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    merge_cli.merge(path, folder / "out", options=OPTIONS)
    return make_plan(load_recipe(path))


def stored(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


def templates_of(folder: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("text", [BROKEN, "{% if %}", "{{ x|nothing }}", "mine.jinja"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_recipes_template_that_is_not_valid(tmp_path: Path, text: str, command: str) -> None:
    recipe = family_of_four(tmp_path) | {"chat_template": text}
    (tmp_path / "mine.jinja").write_text("a\n{{ x")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    words = [tmp_path / "recipe.yaml", *([tmp_path / "out"] if command == "run" else [])]
    failed(cli(command, *words), 2, "recipe.yaml:7:16: chat_template: not valid Jinja", "(line ")
    assert not (tmp_path / "out").exists()


def test_auto_does_not_take_a_broken_template(tmp_path: Path) -> None:
    recipe = family_of_four(tmp_path, base="A", a=BROKEN, b=BROKEN, c="C")
    plan = merge(tmp_path, {**recipe, "chat_template": "auto"})
    assert templates_of(tmp_path / "out") == "A"
    assert [n for n in plan.notes if "not valid Jinja" in n and n.startswith(("a:", "b:"))]


def test_auto_where_every_template_is_broken(tmp_path: Path) -> None:
    """The tokenizer's own stays as it is, and that is said."""
    recipe = family_of_four(tmp_path, base=BROKEN)
    plan = merge(tmp_path, {**recipe, "chat_template": "auto"})
    assert templates_of(tmp_path / "out") == BROKEN
    assert any("base: its chat template is not taken" in note for note in plan.notes)
    assert any("stay as they are" in note for note in plan.notes)


@pytest.mark.parametrize("chosen", ["auto", "chatml"])
def test_templates_by_name_are_kept(tmp_path: Path, chosen: str) -> None:
    several = stored(default="D", tool_use="T", rag="R")
    recipe = family_of_four(tmp_path, base=several, a="A")
    plan = merge(tmp_path, {**recipe, "chat_template": chosen})
    expected = "D" if chosen == "auto" else BUILT_IN["chatml"]
    assert templates_of(tmp_path / "out") == {"default": expected, "tool_use": "T", "rag": "R"}
    assert any("with base's rag, tool_use" in note for note in plan.notes)
    again = tmp_path / "again"
    merge_cli.merge(tmp_path / "out" / "merge_recipe.yaml", again, options=OPTIONS)
    assert templates_of(again) == templates_of(tmp_path / "out")


def test_auto_takes_all_templates_of_one_model(tmp_path: Path) -> None:
    """Those of the tokenizer's model do not speak the chosen one's language."""
    recipe = family_of_four(tmp_path, base="A", a=stored(default="D", tool_use="T"), b="D", c="D")
    folder = tmp_path / "base" / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("R")
    (tmp_path / "base" / "chat_template.jinja").write_text("A")
    plan = merge(tmp_path, {**recipe, "chat_template": "auto"})
    assert templates_of(tmp_path / "out") == {"default": "D", "tool_use": "T"}
    assert any("base: its chat template rag is left out" in note for note in plan.notes)


def test_names_and_templates_that_cannot_be_kept(tmp_path: Path) -> None:
    several = [*stored(default="D", tool_use=BROKEN), {"name": "../evil", "template": "E"}]
    recipe = family_of_four(tmp_path, base=several)
    plan = merge(tmp_path, {**recipe, "chat_template": "auto"})
    assert templates_of(tmp_path / "out") == "D"
    assert not list(tmp_path.rglob("evil*"))
    left_out = [note for note in plan.notes if "is left out" in note]
    assert len(left_out) == 2


def test_files_win_over_the_config_as_in_transformers(tmp_path: Path) -> None:
    several = stored(default="D", tool_use="T")
    recipe = family_of_four(tmp_path, base=several)
    (tmp_path / "base" / "chat_template.jinja").write_text("file")
    merge(tmp_path, {**recipe, "chat_template": "auto"})
    assert templates_of(tmp_path / "out") == templates_of(tmp_path / "base") == "file"


def test_a_template_that_is_a_link_is_not_published(tmp_path: Path) -> None:
    recipe = family_of_four(tmp_path)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "c" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="link out of the model's folder"):
        merge(tmp_path, {**recipe, "chat_template": "auto"})
