"""The SmolLM2 family: its calculations, the committed rows and adapters, the tables about it."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors

import merge_cli
from merge_cli.lora.config import read_config
from tests.support.paths import ROOT

FAMILY = ROOT / "zoo" / "smollm"
EXPERTS = ("arithmetic", "german", "python")
SPLITS = ("train", "val", "test")
# What SmolLM2-135M's config.json says; the model itself is not in the repository.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
COMPUTED = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of scripts/zoo or scripts/experiments, whose names are not a package's."""
    folders = [str(ROOT / "scripts" / name) for name in ("experiments", "zoo")]
    loaded = set(sys.modules)

    def load(folder: str, name: str) -> Any:
        monkeypatch.syspath_prepend(str(ROOT / "scripts" / folder))
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - loaded:
        if str(Path(getattr(sys.modules[name], "__file__", None) or "").parent) in folders:
            del sys.modules[name]


def rows(name: str, split: str) -> list[dict[str, str]]:
    text = (FAMILY / "data" / f"{name}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def read_row(row: dict[str, str]) -> tuple[int, str, int, int]:
    """Operands, operation and answer of a row, by its text alone."""
    example, question, rest = re.split(r"\n", row["prompt"] + row["completion"])
    assert (example, rest) == ("5 + 3 = 8", "")
    found = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", question)
    assert found
    assert row["prompt"].endswith(" =")
    return int(found[1]), found[2], int(found[3]), int(found[4])


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_exact(script: Any, split: str) -> None:
    sums = script("zoo", "sums")
    made = [sums.row(step) for step in itertools.islice(sums.calculations(split), 600)]
    for row in [*made, *rows("arithmetic", split)]:
        left, operation, right, answer = read_row(row)
        assert answer == COMPUTED[operation](left, right)


def test_no_pair_or_its_twin_is_on_two_sides(script: Any) -> None:
    sums = script("zoo", "sums")
    seen: dict[str, set[tuple[int, int]]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        # Everything that the split has: the largest operation has 8,100 calculations.
        for step in itertools.islice(sums.calculations(split), 25_000):
            seen[split].add(step.pair)
        for left, _, right, _ in map(read_row, rows("arithmetic", split)):
            assert (min(left, right), max(left, right)) in seen[split]
    assert not any(seen[a] & seen[b] for a, b in itertools.combinations(SPLITS, 2))
    pairs = {step.pair for operation in sums.OPERATIONS for step in sums.every(operation)}
    assert set.union(*seen.values()) == pairs
    assert (3, 5) not in pairs  # those of the solved example


def test_calculations_repeat_only_when_all_have_come(script: Any) -> None:
    sums = script("zoo", "sums")
    made = list(itertools.islice(sums.calculations("val"), 600))
    for operation in ("+", "-"):
        shown = [step for step in made if step.operation == operation]
        assert len(shown) == len(set(shown)) == 200
    assert made == list(itertools.islice(sums.calculations("val"), 600))


def test_only_answers_are_learned(script: Any) -> None:
    adapt = script("zoo", "adapt")
    data = {"sums": adapt.Answers([([1, 5, 6, 7, 8], 3), ([1, 5, 6], 1)])}
    run = adapt.Run("sums", {"sums": 1.0}, steps=1, seed=3, rate=1e-3, rows=12)
    tokens, weights = adapt.batch(run, data, 0)
    assert tokens.shape == (12, 5)
    assert weights.shape == (12, 4)
    for row, counted in zip(tokens.tolist(), weights.tolist(), strict=True):
        # Targets are the tokens after the first; padding counts nowhere.
        whole = {1: [0.0, 0.0, 1.0, 1.0], 0: [1.0, 1.0, 0.0, 0.0]}
        assert counted == whole[int(row[3] == 7)]
    again, _ = adapt.batch(run, data, 0)
    assert tokens.equal(again)


@pytest.mark.parametrize("name", EXPERTS)
def test_rows_are_on_one_side_and_small(name: str) -> None:
    texts = {split: {json.dumps(row) for row in rows(name, split)} for split in SPLITS}
    assert not any(texts[a] & texts[b] for a, b in itertools.combinations(SPLITS, 2))
    assert len(texts["test"]) == len(rows(name, "test"))
    size = sum((FAMILY / "data" / f"{name}.{split}.jsonl").stat().st_size for split in SPLITS)
    assert size < 150_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's config and header; its weights are a hole in the file, since none is read."""
    folder = tmp_path_factory.mktemp("smollm") / "SmolLM2-135M-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes().items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def shapes() -> dict[str, list[int]]:
    hidden, inner, layers, keys = 576, 1536, 30, 192
    found = {"model.embed_tokens.weight": [49152, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.self_attn.q_proj.weight": [hidden, hidden],
            f"{at}.self_attn.k_proj.weight": [keys, hidden],
            f"{at}.self_attn.v_proj.weight": [keys, hidden],
            f"{at}.self_attn.o_proj.weight": [hidden, hidden],
            f"{at}.mlp.gate_proj.weight": [inner, hidden],
            f"{at}.mlp.up_proj.weight": [inner, hidden],
            f"{at}.mlp.down_proj.weight": [hidden, inner],
            f"{at}.input_layernorm.weight": [hidden],
            f"{at}.post_attention_layernorm.weight": [hidden],
        }
    return found


@pytest.mark.parametrize("name", EXPERTS)
def test_an_adapter_has_factors_for_every_matrix(name: str) -> None:
    folder = FAMILY / name
    config = read_config(folder / "adapter_config.json", name)
    assert config["base_model_name_or_path"].endswith("/SmolLM2-135M-Instruct")
    wanted = {}
    for weight, shape in shapes().items():
        if "_proj" in weight:
            at = f"base_model.model.{weight.removesuffix('.weight')}"
            wanted[f"{at}.lora_A.weight"] = [config["r"], shape[1]]
            wanted[f"{at}.lora_B.weight"] = [shape[0], config["r"]]
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {key: list(file.get_slice(key).get_shape()) for key in names} == wanted
        assert all(file.get_tensor(key).isfinite().all() for key in wanted)
        # An adapter that nobody trained has B = 0.
        assert all(file.get_tensor(key).any() for key in wanted if "lora_B" in key)
    assert (folder / "adapter_model.safetensors").stat().st_size < 6_000_000
    assert "license: apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_adapters_fit_their_base(tmp_path: Path, base: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    models = "\n".join(f"  - model: {base}+{FAMILY / name}" for name in EXPERTS)
    recipe.write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}\n")
    plan = merge_cli.plan(recipe)
    assert {task.name for task in plan.tasks} == set(shapes())


def test_the_page_says_what_was_measured(script: Any) -> None:
    smollm = script("experiments", "smollm")
    results = json.loads((ROOT / "docs/experiments/smollm.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/experiments/smollm.md").read_text(encoding="utf-8")
    assert smollm.table(results) in page
    assert smollm.losses(results) in page
    assert results["examples"]["arithmetic"]["examples"] >= 200


def test_differences_are_paired(script: Any) -> None:
    smollm = script("experiments", "smollm")

    def found(parts: list[float]) -> dict[str, Any]:
        one = {"parts": parts, "weights": [1.0] * len(parts)}
        return {"cpu_seconds": 0.0, "tasks": {"arithmetic": one, "german": one, "python": one}}

    measured = {
        "base": found([0.0, 1.0] * 20), "uniform soup": found([0.0, 1.0] * 20),
        "DAM": found([0.5, 1.5] * 20),
    }  # fmt: skip
    models = smollm.summarised(measured)["models"]
    gain = models["DAM"]["tasks"]["german"]["minus base"]
    # Every example is 0.5 more: whatever is drawn, so is the difference.
    assert gain == {"value": 0.5, "interval": [0.5, 0.5]}
    assert models["DAM"]["tasks"]["german"]["interval"][0] < 1.0
