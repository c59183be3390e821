"""Token numbers are rows of an embedding: each is held against it before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.errors import RecipeError, SourceError
from merge_cli.planning.layers import layer_key_of, layer_stacks
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.tiny import Tensors, write_model

ROWS = 8
TOKENS = {f"t{number}": number for number in range(ROWS)}
WRONG: list[Any] = [-5, -1, 2 * ROWS + 1, 10**9, 2**31, 2**63, 10**30, True, 1.0, "3", None, [1]]


def write_models(folder: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors: Tensors = {
            "model.embed_tokens.weight": torch.randn(ROWS, 4, generator=generator),
            "lm_head.weight": torch.randn(ROWS, 4, generator=generator),
        }
        write_model(folder / name, tensors, {"model_type": "odd", "tie_word_embeddings": False})
        write_tokens(folder / name, TOKENS)


def write_tokens(folder: Path, tokens: dict[str, Any], added: list[Any] | None = None) -> None:
    document = {"model": {"type": "WordLevel", "vocab": tokens}, "added_tokens": added or []}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def plan(folder: Path, source: str = "union", **tokenizer: Any) -> Any:
    models = [{"model": name, "parameters": {"weight": 1}} for name in "ab"]
    section = {"source": source, **tokenizer}
    recipe = {"merge_method": "linear", "tokenizer": section, "models": models}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return make_plan(load_recipe(folder / "recipe.yaml"))


@pytest.mark.parametrize("number", WRONG, ids=str)
@pytest.mark.parametrize("file", ["vocab", "added", "vocab.json", "added_tokens.json"])
@pytest.mark.parametrize("source", ["union", "a"])
def test_a_number_that_is_no_row(source: str, file: str, number: Any, tmp_path: Path) -> None:
    write_models(tmp_path)
    folder = tmp_path / "b"
    if file == "vocab":
        write_tokens(folder, {**TOKENS, "odd": number})
    elif file == "added":
        write_tokens(folder, TOKENS, [{"content": "odd", "id": number, "special": True}])
    else:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(TOKENS))
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**known, "odd": number}))
    with pytest.raises(SourceError) as raised:
        plan(tmp_path, source)
    assert "b" in str(raised.value)


@pytest.mark.parametrize("where", ["a", "b"])
def test_two_tokens_of_one_number(where: str, tmp_path: Path) -> None:
    write_models(tmp_path)
    write_tokens(tmp_path / where, {**TOKENS, "twin": 3})
    with pytest.raises(SourceError, match="'t3' and 'twin' one number, 3"):
        plan(tmp_path)


def test_a_token_behind_the_rows_is_no_mistake(tmp_path: Path) -> None:
    write_models(tmp_path)
    write_tokens(tmp_path / "b", TOKENS, [{"content": "<pad>", "id": ROWS, "special": True}])
    assert plan(tmp_path).aligned.rows == ROWS  # it has no row to merge


@pytest.mark.parametrize("multiple", [10**10, 2**63, 0, -8, True])
def test_padding_has_a_bound(multiple: Any, tmp_path: Path) -> None:
    write_models(tmp_path)
    with pytest.raises(RecipeError, match="pad_to_multiple_of"):
        plan(tmp_path, pad_to_multiple_of=multiple)


def test_a_number_in_a_name_that_no_layer_has() -> None:
    assert layer_key_of("model.layers.99999.mlp.weight")
    names = [f"model.layers.{number}.mlp.weight" for number in (0, 1, 10**9, int("9" * 4000))]
    assert layer_stacks(names) == {"model.layers": 2}
