"""Adapters merged with one another: the same as merging the models, without the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import MergeCliError, MismatchError, RecipeError, SourceError
from merge_cli.options import MergeOptions
from tests.support.adapters import LINEAR, gpt2, llama, mixtral, write
from tests.support.command import cli
from tests.support.hub_server import HubServer
from tests.support.tiny import read_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = MergeOptions(device="cpu", threads=2)
NAMES = ("adapter1", "adapter2")


def recipe(folder: Path, method: str, models: Any = NAMES, **keys: Any) -> Path:
    listed = [one if isinstance(one, dict) else {"model": one} for one in models]
    document = {"merge_method": method, "models": listed, "output": "adapter", **keys}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    return path


def merge(folder: Path, *given: Any, **keys: Any) -> dict[str, Any]:
    path = recipe(folder, *given, **keys)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return merge_cli.merge(path, folder / "out", options=OPTIONS).report


def applied(folder: Path, adapter: str = "out") -> dict[str, torch.Tensor]:
    """What PEFT makes of the base and an adapter."""
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / adapter).merge_and_unload()
    return {name: value.double() for name, value in model.state_dict().items()}


def changes(folder: Path, adapter: str) -> dict[str, torch.Tensor]:
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    start = {name: value.double().clone() for name, value in base.state_dict().items()}
    return {name: value - start[name] for name, value in applied(folder, adapter).items()}


CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "plain": (llama, [{"r": 4, "lora_alpha": 6, "target_modules": LINEAR},
                      {"r": 2, "lora_alpha": 3, "target_modules": LINEAR}]),
    "rslora and patterns": (llama, [
        {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True},
        {"r": 3, "lora_alpha": 6, "target_modules": LINEAR, "rank_pattern": {"down_proj": 8},
         "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 32}}]),
    "embeddings": (llama, [
        {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}]),
    "stored [in, out]": (gpt2, [
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}]),
}  # fmt: skip


@pytest.fixture(params=CASES)
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    make, abouts = CASES[request.param]
    for number, about in enumerate(abouts, start=1):
        write(tmp_path, make, number, **about)
    return tmp_path


@pytest.mark.parametrize("method", ["task_arithmetic", "soup"])
def test_weighted_sums_are_exact(folder: Path, method: str) -> None:
    weights = (0.7, -0.2) if method == "task_arithmetic" else (3.0, 1.0)
    models = [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in zip(NAMES, weights, strict=True)
    ]
    scale = {"parameters": {"lambda": 1.5}} if method == "task_arithmetic" else {}
    report = merge(folder, method, models, **scale)
    shares = [1.5 * w for w in weights] if scale else [w / sum(weights) for w in weights]
    first, second = (changes(folder, name) for name in NAMES)
    found = changes(folder, "out")
    moved = 0
    for name, change in found.items():
        wanted = shares[0] * first[name] + shares[1] * second[name]
        torch.testing.assert_close(change, wanted, rtol=1e-5, atol=2e-6)
        moved += bool(change.abs().max() > 1e-3)
    assert moved >= len(report["adapter"]["modules"]) > 0
    assert report["adapter"]["share"] == pytest.approx(1.0, abs=1e-12)
    for name in NAMES:  # the sum has no more directions than the parts together
        assert json.loads((folder / name / "adapter_config.json").read_text())["r"] <= 4
    assert all(module["rank"] <= 12 for module in report["adapter"]["modules"].values())


def test_what_peft_adds_up_is_the_same(tmp_path: Path) -> None:
    for number, rank in ((1, 4), (2, 2)):
        write(tmp_path, llama, number, r=rank, lora_alpha=6, target_modules=LINEAR)
    models = [{"model": "adapter1", "parameters": {"weight": 0.6}},
              {"model": "adapter2", "parameters": {"weight": 0.5}}]  # fmt: skip
    merge(tmp_path, "task_arithmetic", models)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter1", adapter_name="a")
    model.load_adapter(tmp_path / "adapter2", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.6, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    theirs = model.merge_and_unload(adapter_names=["both"]).state_dict()
    for name, value in applied(tmp_path).items():
        torch.testing.assert_close(value.float(), theirs[name], rtol=1e-5, atol=1e-6)


METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.4, "lambda": 0.8},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.3},
    "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "sce": {"select_topk": 0.7},
    "model_stock": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_do_what_they_do_to_models(tmp_path: Path, method: str) -> None:
    """On a base of zeros, where base + change is the change itself, bit for bit."""
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, lora_alpha=6, target_modules=LINEAR)
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(file).items()}, file, {"format": "pt"})
    keys = {"parameters": METHODS[method], "seed": 7}
    whole = recipe(tmp_path, method, [f"base+{name}" for name in NAMES], base_model="base",
                   output=None, **keys)  # fmt: skip
    wanted = read_model(merge_cli.merge(whole, tmp_path / "model", options=OPTIONS).path)
    report = merge(tmp_path, method, **keys, output={"adapter": {"energy": 1}})
    found = applied(tmp_path)
    for name in report["adapter"]["modules"]:
        assert wanted[name].abs().max() > 0
        torch.testing.assert_close(found[name].float(), wanted[name], rtol=1e-4, atol=1e-6)
    assert len(report["adapter"]["modules"]) == 2 * len(LINEAR)


@pytest.mark.parametrize("method", METHODS)
def test_no_base_is_needed_for_what_the_models_would_become(tmp_path: Path, method: str) -> None:
    """On a real base, to the rounding of base + change in float32."""
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, lora_alpha=6, target_modules=LINEAR)
    keys = {"parameters": METHODS[method], "seed": 7}
    whole = recipe(tmp_path, method, [f"base+{name}" for name in NAMES], base_model="base",
                   output=None, dtype="float32", **keys)  # fmt: skip
    wanted = read_model(merge_cli.merge(whole, tmp_path / "model", options=OPTIONS).path)
    start = read_model(tmp_path / "base")
    report = merge(tmp_path, method, **keys, output={"adapter": {"energy": 1}})
    found = applied(tmp_path)
    for name in report["adapter"]["modules"]:
        assert (wanted[name] - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(found[name].float(), wanted[name], rtol=0, atol=2e-6)


def test_rank_and_energy_cut(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, lora_alpha=6, target_modules=LINEAR)
    plain = merge(tmp_path, "ties", parameters={"density": 0.5})["adapter"]
    assert {module["rank"] for module in plain["modules"].values()} == {4}
    assert 0.3 < plain["share"] < 0.999
    cut = merge(tmp_path, "soup", output={"adapter": {"rank": 3}})["adapter"]
    assert {module["rank"] for module in cut["modules"].values()} == {3}
    half = merge(tmp_path, "ties", output={"adapter": {"energy": 0.5}})["adapter"]
    assert all(module["share"] >= 0.5 for module in half["modules"].values())
    assert len({module["rank"] for module in half["modules"].values()}) > 1
    notes = merge_cli.plan(recipe(tmp_path, "ties", output={"adapter": {"energy": 0.5}})).notes
    assert "an adapter is written: 50 % of each matrix's sum of squares" in notes


def test_a_module_that_one_leaves_alone_has_no_change_there(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=["q_proj"])
    write(tmp_path, llama, 2, r=4, target_modules=["q_proj", "up_proj"])
    report = merge(tmp_path, "soup")
    assert "adapter1 leaves 2 of 4 modules as they are" in report["notes"]
    name = "model.layers.0.mlp.up_proj.weight"
    found, own = changes(tmp_path, "out"), changes(tmp_path, "adapter2")
    torch.testing.assert_close(found[name], own[name] / 2, rtol=1e-5, atol=1e-6)


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, lora_alpha=6, target_modules=LINEAR)
    for method in ("task_arithmetic", "dare_ties"):
        merge(tmp_path, method, ["base+adapter1", "adapter2"], parameters={"weight": 0.5},
              base_model="org/base")  # fmt: skip
        wanted = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        single = MergeOptions(device="cpu", threads=1)
        resolved = tmp_path / "out" / "merge_recipe.yaml"
        again = merge_cli.merge(resolved, tmp_path / "again", options=single).path
        assert (again / "adapter_model.safetensors").read_bytes() == wanted
        shutil.rmtree(again)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"


def test_adapters_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, lora_alpha=6, target_modules=LINEAR)
        hub.add(f"org/a{number}", tmp_path / f"adapter{number}")
    merge(tmp_path, "ties", parameters={"density": 0.5})
    wanted = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    merge_cli.plan(recipe(tmp_path, "ties", ["org/a1", "org/a2"], parameters={"density": 0.5}))
    planned = hub.sent("adapter_model.safetensors")
    report = merge(tmp_path, "ties", ["org/a1", "org/a2"], parameters={"density": 0.5})
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == wanted
    assert hub.sent("adapter_model.safetensors") > planned
    assert all(one["revision"] for one in report["inputs"])
    text = (tmp_path / "out" / "merge_recipe.yaml").read_text()
    assert f"org/a1@{report['inputs'][0]['revision']}" in text
    merge_cli.merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again", options=OPTIONS)


def test_a_merged_adapter_is_a_source(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, lora_alpha=6, target_modules=LINEAR)
    merge(tmp_path, "task_arithmetic")
    path = tmp_path / "use.yaml"
    path.write_text("merge_method: passthrough\nmodels: [{model: base+out}]\ndtype: float32\n")
    ours = read_model(merge_cli.merge(path, tmp_path / "model", options=OPTIONS).path)
    theirs = applied(tmp_path)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), theirs[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=["q_proj"])
    write(tmp_path, llama, 2, r=4, target_modules=["q_proj"], use_dora=True)
    write(tmp_path, llama, 3, r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    write(tmp_path / "wide", lambda: llama(hidden_size=32), 4, r=4, target_modules=["q_proj"])

    def refused(kind: type[MergeCliError], said: str, *given: Any, **keys: Any) -> None:
        with pytest.raises(kind, match=said):
            merge_cli.plan(recipe(tmp_path, *given, **keys))

    refused(SourceError, "DoRA", "soup", ["adapter1", "adapter2"])
    refused(SourceError, "replaces tensors of its model", "soup", ["adapter1", "adapter3"])
    refused(MismatchError, "q_proj", "soup", ["adapter1", "wide/adapter4"])
    refused(SourceError, "no adapter", "soup", ["adapter1", "base"])
    refused(RecipeError, "has no meaning in a merge of adapters", "soup", dtype="bfloat16")
    refused(RecipeError, "must be adapter or model", "soup", output="lora")
    refused(RecipeError, "Did you mean 'rank'", "soup", output={"adapter": {"rnk": 2}})
    refused(RecipeError, "at least 1", "soup", output={"adapter": {"rank": 0}})
    refused(RecipeError, "up to 1", "soup", output={"adapter": {"energy": 2}})
    path = recipe(tmp_path, "soup", name="first")
    path.write_text(path.read_text() + "---\nmerge_method: soup\nmodels: [{model: first}]\n")
    with pytest.raises(RecipeError, match="a recipe of their own"):
        merge_cli.load_recipe(path)


def test_a_misspelt_cut_is_the_only_thing_that_is_wrong(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=2, target_modules=["q_proj"])
    path = recipe(tmp_path, "ties", output={"adapter": {"ranc": 4}})
    with pytest.raises(RecipeError) as caught:
        merge_cli.plan(path)
    (problem,) = caught.value.problems
    assert problem.key == "output.adapter.ranc"
    assert "Did you mean 'rank'?" in str(problem)


def test_nan_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, target_modules=LINEAR)
    file = tmp_path / "adapter2" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    for method in ("ties", "soup"):
        with pytest.raises(MergeCliError, match="NaN") as caught:
            merge(tmp_path, method)
        assert "adapter2, adapter_model.safetensors, base_model.model." in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_changes_that_cancel_out_make_an_adapter_that_is_loaded(tmp_path: Path, make: Any) -> None:
    abouts = {
        llama: {"target_modules": LINEAR}, gpt2: {"target_modules": ["c_attn"]},
        mixtral: {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    }  # fmt: skip
    write(tmp_path, make, 1, r=2, **abouts[make])
    shutil.copytree(tmp_path / "adapter1", tmp_path / "adapter2")
    models = [{"model": name, "parameters": {"weight": weight}}
              for name, weight in zip(NAMES, (0.0, 0.0), strict=True)]  # fmt: skip
    path = recipe(tmp_path, "task_arithmetic", models)
    done = cli("run", path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no module changes" in done.stdout
    assert not any(change.any() for change in changes(tmp_path, "out").values())


def test_what_an_adapter_lacks_or_holds_in_vain_is_noted(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=2, target_modules=["q_proj", "embed_tokens"])
    write(tmp_path, llama, 2, r=2, target_modules=["q_proj", "v_proj"])
    file = tmp_path / "adapter2" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "v_proj" not in n}, file)
    notes = merge_cli.plan(recipe(tmp_path, "ties")).notes
    assert any("adapter1: its copy of model.embed_tokens.weight is left out" in n for n in notes)
    assert any("adapter2: adapter_config.json names v_proj, and it has no" in n for n in notes)
    assert sum("no factors for that" in note for note in notes) == 1


def test_factors_that_the_config_does_not_select_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=2, target_modules=LINEAR)
    file = tmp_path / "adapter2" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "exclude_modules": ["v_proj"]}))
    with pytest.raises(MismatchError, match="v_proj: adapter2: exclude_modules in adapter_config"):
        merge_cli.plan(recipe(tmp_path, "ties"))


def test_the_command(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, target_modules=LINEAR)
    path = recipe(tmp_path, "ties", parameters={"density": 0.5})
    planned = cli("plan", path)
    assert planned.returncode == 0, planned.stderr
    assert "an adapter is written: rank 4" in planned.stdout
    assert "no change" not in planned.stdout
    done = cli("run", path, tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "merged 2 adapters into" in done.stdout
    again = cli("run", path, tmp_path / "o")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_what_runs_a_model_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, llama, number, r=4, target_modules=LINEAR)
    path = recipe(tmp_path, "task_arithmetic")
    (tmp_path / "text.txt").write_text("some text")
    text = str(tmp_path / "text.txt")
    for flags, said in (
        (["--data", text], "an adapter cannot be evaluated by itself"),
        (["--tune", "lambda=0:1", "--tune-on", text], "--tune judges whole models"),
    ):
        ran = cli("run", path, tmp_path / "o", *flags)
        assert ran.returncode == 2
        assert said in ran.stderr
        assert not (tmp_path / "o").exists()
