"""The model card: what the Hub reads of it, from what the sources say of themselves."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

import merge_cli
from merge_cli.checkpoint.cards import front_matter, read_card
from merge_cli.report.card import card_for
from tests.support.hub_server import HubServer
from tests.support.tiny import Family


def add(hub: HubServer, family: Family, name: str, front: str | None) -> str:
    """One of the family as a repository, with a card of this front matter."""
    files = {p.name: p.read_bytes() for p in (family.folder / name).iterdir()}
    if front is not None:
        files["README.md"] = f"---\n{front}---\n# {name}\n".encode()
    return hub.add(f"org/{name}", files)


def card_of(family: Family, out: Path, extra: str = "") -> tuple[dict[str, Any], str]:
    recipe = family.write(
        "merge_method: ties\nbase_model: hf://org/base\nmodels: [org/a@main, org/b]\n" + extra
    )
    text = (merge_cli.merge(recipe, out).path / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n", 2)[1]), text


def test_what_all_sources_agree_on(hub: HubServer, family: Family, tmp_path: Path) -> None:
    base = add(hub, family, "base", "license: apache-2.0\nlanguage: en\n")
    a = add(hub, family, "a", "license: apache-2.0\nlanguage: [ja, en]\ndatasets: [org/text]\n")
    add(hub, family, "b", "license: [apache-2.0]\nlanguage: no\n")  # Norwegian, and not false
    front, text = card_of(family, tmp_path / "out")
    assert front == {
        "base_model": ["org/base", "org/a", "org/b"],
        "base_model_relation": "merge",
        "license": "apache-2.0",
        "language": ["en", "ja", "no"],
        "datasets": ["org/text"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "merge-cli", "ties"],
    }
    assert f"| [org/base](https://huggingface.co/org/base) | base | [`{base}`]" in text
    assert f"| [org/a@main](https://huggingface.co/org/a) | merged | [`{a}`]" in text
    assert 'model_id = "out"' in text
    assert "hf://" not in text
    assert "licences" not in text


def test_hubs_own_library_reads_it(hub: HubServer, family: Family, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        add(hub, family, name, "license: mit\nlanguage: no\n")
    front, text = card_of(family, tmp_path / "out")
    assert ModelCardData(**front).to_dict() == front
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.base_model == ["org/base", "org/a", "org/b"]
    if int(version("huggingface_hub").partition(".")[0]) >= 2:  # before, huggingface.co was asked
        card.validate()  # asks the server, whose rules are the Hub's


@pytest.mark.parametrize("other", ["license: mit\n", "language: de\n", None, "license: [\n"])
def test_no_licence_unless_all_state_it(
    hub: HubServer, family: Family, tmp_path: Path, other: str | None
) -> None:
    for name in ("base", "a"):
        add(hub, family, name, "license: apache-2.0\n")
    add(hub, family, "b", other)
    front, text = card_of(family, tmp_path / "out")
    assert "license" not in front
    stated = "apache-2.0, mit." if other == "license: mit\n" else "apache-2.0; 1 of them states"
    assert f"The sources state these licences: {stated}" in text


def test_licences_of_their_own_must_be_the_same(
    hub: HubServer, family: Family, tmp_path: Path
) -> None:
    own = "license: other\nlicense_name: gem\nlicense_link: LICENSE\n"
    for name in ("base", "a", "b"):
        add(hub, family, name, own)
    front, _ = card_of(family, tmp_path / "one")
    assert (front["license"], front["license_name"]) == ("other", "gem")
    add(hub, family, "b", own.replace("gem", "jewel"))
    front, _ = card_of(family, tmp_path / "two")
    assert "license" not in front


def test_the_recipe_has_the_last_word(hub: HubServer, family: Family, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        add(hub, family, name, f"license: {name}\nlanguage: en\n")
    extra = "metadata: {license: cc-by-4.0, language: [fr], author: me}\n"
    front, text = card_of(family, tmp_path / "out", extra)
    assert front["license"] == "cc-by-4.0"
    assert front["language"] == ["fr"]
    assert "author" not in front
    assert "these licences" not in text


def test_cards_of_local_folders_count(family: Family, tmp_path: Path) -> None:
    for name in ("base", "a", "b", "c"):
        card = "\ufeff---\r\nlicense: mit\r\n---\r\n# x\r\n"
        (family.folder / name / "README.md").write_bytes(card.encode())
    out = merge_cli.merge(family.recipe("ties"), tmp_path / "out").path
    front = front_matter((out / "README.md").read_text(encoding="utf-8"))
    assert front["license"] == "mit"
    assert "base_model" not in front  # names of folders would lead nowhere


def test_the_example_names_the_repository() -> None:
    card = '# x\n\nmodel_id = "here"\nmodel_id = "not this one"\n'
    assert card_for(card, "org/m").splitlines()[2:] == [
        'model_id = "org/m"',
        'model_id = "not this one"',
    ]


def test_an_adapter_is_a_source_of_its_own(hub: HubServer, family: Family, tmp_path: Path) -> None:
    for name in ("base", "a"):
        add(hub, family, name, "license: mit\n")
    folder = tmp_path / "adapter"
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: fr\n---\n")
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{at}.lora_A.weight": torch.ones(2, 16), f"{at}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    commit = hub.add("org/adapter", folder)
    recipe = family.write(
        "merge_method: ties\nbase_model: org/base\nmodels: [org/a, org/base+hf://org/adapter]\n"
    )
    out = merge_cli.merge(recipe, tmp_path / "out").path
    card = (out / "README.md").read_text(encoding="utf-8")
    front = front_matter(card)
    assert front["base_model"] == ["org/base", "org/a", "org/adapter"]
    assert (front["license"], front["language"]) == ("mit", ["fr"])
    assert f"(https://huggingface.co/org/adapter/tree/{commit})" in card
    assert f"hf://org/adapter@{commit}" in (out / "merge_recipe.yaml").read_text()


@pytest.mark.parametrize(
    "front",
    [
        "[" * 5000,
        "a: " * 300 + "1",
        "a0: &a [x, x, x]\n" + "b: &b [*a, *a]\n" * 3 + "c: [" + "*b, " * 100_000 + "]",
        'license: "\\ud800"',
        'license: "mit\\x1b[31m"',
        "? [a]\n: b",
        "license: *nowhere",
    ],
    ids=["flow", "block", "aliases", "surrogate", "control", "key", "alias"],
)
def test_a_broken_card_is_a_note(family: Family, tmp_path: Path, front: str) -> None:
    (family.folder / "a" / "README.md").write_text(f"---\n{front}\n---\n# a\n")
    recipe = family.write("merge_method: soup\nmodels: [./a, ./b]\n")
    notes = merge_cli.plan(recipe).notes
    assert [note for note in notes if note.startswith("./a: README.md ")], notes
    assert (merge_cli.merge(recipe, tmp_path / "out").path / "README.md").is_file()


def test_a_card_that_is_no_file_is_a_note(tmp_path: Path) -> None:
    assert read_card(tmp_path) == ({}, "")
    (tmp_path / "README.md").mkdir()
    assert read_card(tmp_path) == ({}, "README.md cannot be read: it is not a regular file")
    (tmp_path / "README.md").rmdir()
    (tmp_path / "README.md").symlink_to("/dev/zero")
    assert read_card(tmp_path) == ({}, "README.md cannot be read: it is not a regular file")
