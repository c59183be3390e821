"""Outputs against their classes: stacked layers of every rule load as what they were, or are
refused; nothing is made up."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.checkpoint.class_config import UnknownClass
from merge_cli.checkpoint.config import merged_config
from merge_cli.errors import MergeCliError, MismatchError, RecipeError
from merge_cli.options import MergeOptions
from merge_cli.planning import skeleton, structure
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.skeleton import build
from merge_cli.planning.structure import check_structure
from tests.support.tiny import llama_config, llama_family, llama_tensors, write_model

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = MergeOptions(device="cpu", threads=1)
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
}  # fmt: skip
TWO = ["linear_attention", "full_attention"] * 2
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("BambaForCausalLM", {"attn_layer_indices": [1], "mamba_expand": 2, **MAMBA}),
    "ernie": ("Ernie4_5_MoeForCausalLM", {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 3}),
    "ernie_every_second": ("Ernie4_5_MoeForCausalLM", {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
        "moe_layer_end_index": -1, "moe_layer_interval": 2}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {
        **MOE, "num_experts": 4, "layer_types": ["conv", "full_attention"] * 2}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**MOE, "n_routed_experts": 4, "head_dim": 8}),
    "jamba": ("JambaForCausalLM", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "zamba2": ("Zamba2ForCausalLM", {
        "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "mamba_headdim": 8,
        "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8}),
    "granite_hybrid": ("GraniteMoeHybridForCausalLM", {
        "layer_types": ["mamba", "attention", "mamba", "mamba"], "num_local_experts": 0,
        "shared_intermediate_size": 48, "mamba_expand": 2, **MAMBA}),
    "llama4": ("Llama4ForCausalLM", {
        "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2,
        "head_dim": 8, "attention_chunk_size": 8}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 4}),
    "gpt_neo": ("GPTNeoForCausalLM", {
        "num_layers": 4, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 2]]}),
    "nemotron_h": ("NemotronHForCausalLM", {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "head_dim": 8, "n_groups": 1,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {
        "lru_width": 32, "attention_window_size": 8, "head_dim": 8}),
    "minimax": ("MiniMaxForCausalLM", {
        "head_dim": 8, "num_local_experts": 2, "layer_types": TWO, "block_size": 8}),
    "diff_llama": ("DiffLlamaForCausalLM", {}),
}  # fmt: skip
SLICES = {
    "deeper": ([0, 3], [1, 4]), "moved": ([2, 4], [0, 2]), "twice": ([0, 4], [0, 4]),
    "first": ([0, 2],), "last": ([2, 4],),
}  # fmt: skip
# What cannot be said in the config's own words.
REFUSED = {
    "ernie": {"moved", "twice"}, "lfm2_moe": {"deeper", "moved", "twice"},
    "glm4_moe": {"moved", "twice"}, "zamba2": {"deeper", "twice", "first", "last"},
}  # fmt: skip


def recipe(folder: Path, ranges: Any, model: str = "./m") -> Path:
    slices = [{"sources": [{"model": model, "layer_range": span}]} for span in ranges]
    text = json.dumps({"merge_method": "passthrough", "slices": slices})
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models by name, each made once."""
    known: dict[str, Path] = {}

    def made(kind: str) -> Path:
        if kind not in known:
            name, keys = CLASSES[kind]
            torch.manual_seed(0)
            model = getattr(hf, name)
            known[kind] = tmp_path_factory.mktemp(kind)
            model(model.config_class(**{**COMMON, **keys})).save_pretrained(known[kind] / "m")
        return known[kind]

    return made


@pytest.mark.parametrize("cut", SLICES)
@pytest.mark.parametrize("kind", CLASSES)
def test_stacked_layers_load_or_are_refused(
    kind: str, cut: str, saved: Any, tmp_path: Path
) -> None:
    folder = saved(kind)
    path = recipe(tmp_path, SLICES[cut], str(folder / "m"))
    if cut in REFUSED.get(kind, ()):
        with pytest.raises((MismatchError, RecipeError)):
            make_plan(load_recipe(path))
        return
    assert not [note for note in make_plan(load_recipe(path)).notes if "not be checked" in note]
    out = merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path
    _, info = getattr(hf, CLASSES[kind][0]).from_pretrained(out, output_loading_info=True)
    assert not {problem: keys for problem, keys in info.items() if keys}


def test_a_layer_keeps_its_kind_where_shapes_say_nothing(saved: Any, tmp_path: Path) -> None:
    """Layers with and without positions have the same tensors."""
    path = recipe(tmp_path, ([3, 4], [0, 3]), str(saved("smollm3") / "m"))
    out = merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path
    model = hf.SmolLM3ForCausalLM.from_pretrained(out)
    assert [layer.self_attn.use_rope for layer in model.model.layers] == [0, 1, 1, 1]


def test_a_rule_by_position_in_a_key_that_nobody_knows(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a class of next year: the layers themselves tell."""
    monkeypatch.setattr("merge_cli.checkpoint.layer_config._LISTED", ())
    monkeypatch.setattr("merge_cli.checkpoint.layer_config._EVERY", ())
    config = saved("smollm3") / "m" / "config.json"
    about = json.loads(config.read_text())
    for key in ("no_rope_layers", "layer_types"):
        about.pop(key)
    for file in config.parent.glob("*.safetensors"):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m" / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr(
        "merge_cli.planning.output_slices.with_layer_types", lambda config, root: config
    )
    monkeypatch.setattr("merge_cli.planning.passes.with_layer_types", lambda config, root: config)
    with pytest.raises(MismatchError, match="of another kind than layer 3"):
        make_plan(load_recipe(recipe(tmp_path, ([3, 4], [0, 3]))))


def test_layers_behind_the_last_are_none_of_the_stack(tmp_path: Path) -> None:
    """GLM and DeepSeek store what predicts further tokens as one layer more."""
    torch.manual_seed(0)
    keys = {**COMMON, **MOE, "n_routed_experts": 4, "head_dim": 8, "num_nextn_predict_layers": 1}
    model = hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**keys))
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({**config, "num_nextn_predict_layers": 1})
    )
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in [name for name in tensors if ".layers.3." in name]:
        tensors[name.replace(".3.", ".4.", 1)] = tensors[name].clone()
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="has 4 layers, not 5"):
        make_plan(load_recipe(recipe(tmp_path, ([0, 3], [3, 5]))))
    plan = make_plan(load_recipe(recipe(tmp_path, ([0, 3], [1, 4]))))
    assert plan.config["num_nextn_predict_layers"] == 0
    assert any("further tokens" in note for note in plan.notes)
    assert not any("eh_proj" in task.name for task in plan.tasks)


# Any recipe


def write_pair(folder: Path, **keys: Any) -> None:
    for seed, name in enumerate("ab"):
        tensors = llama_tensors(torch.Generator().manual_seed(seed), layers=2, tied=False)
        write_model(folder / name, tensors, {**llama_config(layers=2, tied=False), **keys})


def linear(folder: Path, **keys: Any) -> Path:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    text = json.dumps({"merge_method": "linear", "models": models, **keys})
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_what_is_as_its_sources_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a class was built")

    monkeypatch.setattr(skeleton, "build", never)
    make_plan(load_recipe(linear(tmp_path, dtype="float16")))


def test_a_config_that_does_not_fit_the_rows(tmp_path: Path) -> None:
    """Layers cut off, and a config that would count others."""
    write_pair(tmp_path)
    plan = make_plan(load_recipe(linear(tmp_path)))
    shapes = {task.name: task.shape for task in plan.tasks}
    reference = plan.sources[0]

    def check(config: dict[str, Any], shapes: dict[str, Any]) -> list[str]:
        return check_structure(config, shapes, reference, reference.tensors, plan.sources)

    with pytest.raises(MismatchError, match=r"layers\.2\..*it would be made up"):
        check({**plan.config, "num_hidden_layers": 3}, shapes)
    with pytest.raises(MismatchError, match="would leave it out"):
        check({**plan.config, "num_hidden_layers": 1}, shapes)
    with pytest.raises(MismatchError, match=r"the output has \[48, 16\].*wants \[50, 16\]"):
        check({**plan.config, "vocab_size": 50}, shapes)
    with pytest.raises(MismatchError, match="refuses config.json"):
        check({**plan.config, "num_attention_heads": 3, "hidden_act": "no such"}, shapes)
    assert not check({**plan.config, "tie_word_embeddings": True}, {
        name: shape for name, shape in shapes.items() if name != "lm_head.weight"
    })  # fmt: skip


def test_other_tokens_need_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows, where every tensor with a row for each token has them: no library is loaded."""
    write_pair(tmp_path)
    plan = make_plan(load_recipe(linear(tmp_path)))
    shapes = {task.name: task.shape for task in plan.tasks}
    reference, asked = plan.sources[0], list[dict[str, Any]]()

    def remembered(config: Any, shapes: Any, kinds: bool) -> Any:
        asked.append(config)
        return skeleton.remembered(config, shapes, kinds)

    monkeypatch.setattr(structure, "remembered", remembered)

    def check(config: dict[str, Any], shapes: dict[str, Any]) -> int:
        asked.clear()
        problems = check_structure(config, shapes, reference, reference.tensors, plan.sources)
        assert not problems
        return len(asked)

    larger = {n: (50, *s[1:]) if s[0] == 48 else s for n, s in shapes.items()}
    assert check({**plan.config, "vocab_size": 50}, larger) == 0
    assert check({**plan.config, "vocab_size": 50, "eos_token_id": 49}, larger) == 0
    assert check({**plan.config, "eos_token_id": 5}, shapes) == 0
    wrong: list[dict[str, Any]] = [
        {"pad_token_id": 50}, {"pad_token_id": -7}, {"eos_token_id": "a"},
        {"eos_token_id": [1, 99]}, {"other_token_id": 1}, {"tie_word_embeddings": None},
    ]  # fmt: skip
    for keys in wrong:
        asked.clear()
        with contextlib.suppress(MismatchError):
            check({**plan.config, "vocab_size": 50, **keys}, larger)
        assert asked, keys
    one = {**shapes, "lm_head.weight": (50, 16)}
    with pytest.raises(MismatchError, match=r"the output has \[48, 16\].*wants \[50, 16\]"):
        check({**plan.config, "vocab_size": 50}, one)


@pytest.mark.parametrize("tokens", [20, 31])
def test_fewer_tokens_than_a_number_of_one(tmp_path: Path, tokens: int) -> None:
    """The number was one of the source's tokens, and would be none of the output's."""
    write_pair(tmp_path, pad_token_id=30)
    plan = make_plan(load_recipe(linear(tmp_path)))
    reference = plan.sources[0]
    shapes = {task.name: task.shape for task in plan.tasks}
    fewer = {name: (tokens, *s[1:]) if s[0] == 48 else s for name, s in shapes.items()}
    given = {**plan.config, "vocab_size": tokens}, fewer, reference, reference.tensors, plan.sources
    if tokens > 30:
        assert not check_structure(*given)
        return
    with pytest.raises(MismatchError, match="refuses config.json"):
        check_structure(*given)


def test_a_config_that_counts_more_layers_than_there_are(tmp_path: Path) -> None:
    """Names and shapes are its source's own, and its class would make up a layer."""
    family = llama_family(tmp_path)
    layers = llama_config()["num_hidden_layers"]
    config = {**llama_config(), "num_hidden_layers": layers + 1}
    (family.folder / "a" / "config.json").write_text(json.dumps(config))
    recipe = family.folder / "r.yaml"
    recipe.write_text("merge_method: soup\nmodels: [a, b]")
    with pytest.raises(MismatchError, match=f"layers.{layers}.*made up"):
        merge_cli.plan(recipe)
    recipe.write_text("merge_method: soup\nmodels: [b, a]")
    (line,) = [note for note in merge_cli.plan(recipe).notes if "num_hidden_layers" in note]
    assert (
        f"num_hidden_layers differs: b {layers}; a {layers + 1}; the output has that of b" in line
    )


def test_a_fault_of_the_sources_is_a_note(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for name in "ab":
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors = {n: t for n, t in tensors.items() if "gate_proj" not in n}
        tensors["mtp.fc.weight"] = torch.zeros(4, 4)
        save_file(tensors, tmp_path / name / "model.safetensors")
    plan = make_plan(load_recipe(recipe(tmp_path, ([0, 2], [0, 2]), "./a")))
    assert any("lacks" in n and "gate_proj" in n and "as in the sources" in n for n in plan.notes)
    assert any("does not use mtp.fc.weight" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"architectures": ["NobodysModel"]}, "has no NobodysModel"),
        ({"architectures": None}, "does not say which class"),
        ({"architectures": ["os"]}, "has no os"),
        ({"architectures": ["../x"]}, "has no"),
        ({"architectures": ["BertModel"]}, "not a class of the model_type 'llama'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"vocab_size": 2**62}, "vocab_size"),
    ],
)
def test_a_class_that_is_not_known(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownClass, match=words):
        build({**llama_config(), **keys}, {})


def test_where_the_class_is_not_known_the_plan_says_so(tmp_path: Path) -> None:
    write_pair(tmp_path, architectures=["NobodysModel"])
    plan = make_plan(load_recipe(recipe(tmp_path, ([0, 2], [0, 2]), "./a")))
    assert sum("could not be checked" in note for note in plan.notes) == 1


def test_a_rule_by_position_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, architectures=["NobodysModel"], attn_layer_period=2)
    with pytest.raises(RecipeError, match="attn_layer_period: 2"):
        make_plan(load_recipe(recipe(tmp_path, ([0, 2], [0, 2]), "./a")))


@pytest.mark.parametrize(
    "keys",
    [{"attn_implementation": "kernels-community/x"}, {"_attn_implementation": "org/code"},
     {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, {"use_kernels": True},
     {"fusion_config": {"a": True}}, {"transformers_weights": "../x"},
     {"rope_parameters": {"attn_implementation": "org/code", "rope_type": "default",
                          "rope_theta": 1e4}}],
    ids=str,
)  # fmt: skip
def test_a_config_chooses_no_code(keys: dict[str, Any]) -> None:
    tensors = llama_tensors(torch.Generator(), tied=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = build({**llama_config(tied=False), **keys}, shapes)
    assert not found.failure
    assert not found.missing | found.unexpected


# Rewritten configs, whatever class they are of


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("attn_layer_indices", [1], [1, 3, 4]),
        ("full_attn_idxs", [0, 3], [0, 2, 5]),
        ("cross_attention_layers", [3], [2, 5]),
        ("moe_layers_enum", "1,3", "1,2,3,5"),
        ("hybrid_override_pattern", "M*-M", "M*M*-M"),
        ("no_rope_layers", [1, 1, 1, 0], [1, 1, 0, 1, 1, 0]),
        ("num_key_value_heads", [1, 2, 3, 4], [1, 2, 4, 2, 3, 4]),
        ("attention_types", [[["global", "local"], 2]],
         [[["global", "local", "local", "local", "global", "local"], 1]]),
        ("eos_token_id", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("summary_layers_of", [9, 8], [9, 8]),
    ],
)  # fmt: skip
def test_a_key_follows_its_layers(key: str, value: Any, expected: Any) -> None:
    original = {"num_hidden_layers": 4, key: value}
    order = [0, 1, 3, 1, 2, 3]
    if key == "attn_layer_indices":
        order = [0, 1, 2, 1, 1, 3]
    config, _ = merged_config(original, layers=[(original, index) for index in order])
    assert config[key] == expected


@pytest.mark.parametrize(
    ("keys", "order", "words"),
    [
        ({"first_k_dense_replace": 1}, [1, 0], "must come first"),
        ({"num_dense_layers": 2}, [0, 2, 1, 3], "must come first"),
        ({"num_kv_shared_layers": 1}, [0, 3, 1], "must come last"),
        ({"moe_layer_start_index": 1}, [0, 1, 0, 1, 1], "no rule"),
        ({"global_attn_every_n_layers": 3}, [0, 1, 1], "global_attn_every_n_layers: 3"),
    ],
)
def test_a_rule_that_the_layers_break(keys: Any, order: list[int], words: str) -> None:
    original = {"num_hidden_layers": 4, **keys}
    layers = [(original, index) for index in order]
    with pytest.raises(ValueError, match=words):
        merged_config(original, layers=layers)
    doubts: list[str] = []
    merged_config(original, layers=layers, doubts=doubts)
    assert len(doubts) == 1


def test_an_absurd_count_of_layers_costs_nothing(tmp_path: Path) -> None:
    family = llama_family(tmp_path, layers=2)
    for name in ("base", "a"):
        path = family.folder / name / "config.json"
        about = {**json.loads(path.read_text()), "num_hidden_layers": 10**12}
        path.write_text(json.dumps({**about, "attn_layer_indices": [10**11]}))
    try:
        plan = make_plan(load_recipe(recipe(tmp_path, ([0, 2], [0, 2]), "./a")))
    except MergeCliError:
        return
    assert plan.config["num_hidden_layers"] == 4
